"""Surveys without data: each has its own vintage (band, phase, noise), its own geology, and several blocks.

Surveys of one company share a processing phase and a band. Noise power lies between the quietest and the noisiest piece
of the reference survey.
"""

from __future__ import annotations

import numpy as np

from applications.seismic_facies import geology, survey
from applications.seismic_facies.config import Config
from applications.seismic_facies.data import Block, Volumes
from applications.seismic_facies.survey import Reference
from applications.seismic_facies.volumes import Volume
from fl_core.contracts.errors import ConfigError
from fl_core.learning import seeding

COMPANY_SIZE = 4  # surveys of one company


def generate(config: Config, seed: int) -> Volumes:
    """data.clients surveys of data.volumes_per_client blocks; a survey is the same whatever the number of surveys."""
    d = config.data
    if len(d.classes) != geology.CHANNEL + 1:
        raise ConfigError(
            f"data.classes has {len(d.classes)} names; generated volumes hold {geology.CHANNEL + 1} facies",
            remedy="give data with --data, or keep the preset's classes",
        )
    ref = survey.reference(d.reference)
    blocks = [
        one_block(config, ref, seed, client, number)
        for client in range(d.clients)
        for number in range(d.volumes_per_client)
    ]
    return Volumes(tuple(blocks))


def style_of(seed: int, client: int) -> geology.Style:
    rng = seeding.generator(seed, "seismic geology", client)
    return geology.Style(
        facies=tuple(rng.dirichlet(np.full(len(geology.LAYERED), 6.0)).tolist()),
        dip=rng.uniform(0.03, 0.15),
        faults=rng.uniform(0.3, 2.0),
        channels=rng.uniform(1.0, 3.5),
        thickness=rng.uniform(22.0, 40.0),
    )


def one_block(config: Config, ref: Reference, seed: int, client: int, number: int) -> Block:
    d = config.data
    company = client // COMPANY_SIZE
    house = seeding.generator(seed, "seismic company", company)
    stretch, phase = house.uniform(0.85, 1.1), house.normal(0, 0.4)
    vintage = seeding.generator(seed, "seismic vintage", client)
    low, high = np.log(ref.noise_power)
    power = d.noise**2 * np.exp(vintage.uniform(low, high))
    footprint = vintage.uniform(0.2, 1.0) * ref.footprint
    rng = seeding.generator(seed, "seismic block", client, number)
    shape = (d.inlines, d.crosslines, d.samples)
    labels, reflectivity = geology.block(rng, shape, style_of(seed, client))
    inside = slice(geology.PAD, geology.PAD + d.samples)
    signal = survey.filtered(reflectivity, ref, stretch=stretch, phase=phase)[..., inside]
    disturbance = survey.filtered(survey.noise(rng, reflectivity.shape, footprint), ref, stretch=stretch, phase=0.0)[..., inside]  # fmt: skip
    amplitude = signal / signal.std() + np.sqrt(power) * disturbance / disturbance.std()
    name = f"survey-{client:03d}"
    return Block(
        name=f"{name}-block-{number}",
        client=name,
        company=f"company-{company}",
        amplitude=Volume.of(amplitude.astype(np.float32), f"{name}-block-{number}"),
        labels=np.ascontiguousarray(labels[..., inside]),
    )
