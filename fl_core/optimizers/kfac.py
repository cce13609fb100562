"""K-FAC: natural gradient with Kronecker-factored curvature, its work spread over processes.

Martens & Grosse (ICML 2015, arXiv:1503.05671) for linear layers, Grosse & Martens (ICML 2016, arXiv:1602.01407) for
convolutions, Osawa et al. (CVPR 2019, arXiv:1811.12019) for normalisations; decompositions spread over processes as in
KAISA (Pauloski et al., SC 2021, arXiv:2107.01739). The curvature is the empirical Fisher matrix of the mean loss, what
``backward`` computes anyway; or, with ``fisher = "sampled"``, that of targets that the model itself would draw (whoever trains calls
``sample``): of a log-likelihood the Fisher matrix, of a squared error the Gauss-Newton matrix. Statistics are sums over all processes
divided by global counts, so that the step does not depend on how many processes took it. Parameters of other layers take plain
momentum steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fl_core.contracts.errors import ConfigError
from fl_core.contracts.sections import OptimizerConfig
from fl_core.learning.micro_batch import current
from fl_core.optimizers import trainable
from fl_core.optimizers._kfac_blocks import Block, blocks_of, reached

FACTORS = ("kfac_a", "kfac_g")
DECOMPOSED = ("kfac_qa", "kfac_la", "kfac_qg", "kfac_lg")  # eigenvectors and eigenvalues of each


def build(
    model: torch.nn.Module, config: OptimizerConfig, group: dist.ProcessGroup | None = None
) -> torch.optim.Optimizer:
    return KFAC(model, config, group)


@dataclass(frozen=True)
class Cut:
    """A dimension cut into ``count`` diagonal blocks of ``size``, the last one padded with zeros."""

    dim: int
    count: int
    size: int

    @staticmethod
    def of(dim: int, largest: int) -> Cut:
        count = -(-dim // largest)
        return Cut(dim, count, -(-dim // count))

    def blocks(self, factor: Tensor) -> Tensor:
        """(B, dim, dim) -> (B, count, size, size): the diagonal blocks."""
        padded = nn.functional.pad(factor, (0, self.count * self.size - self.dim) * 2)
        shape = (len(factor), self.count, self.size, self.count, self.size)
        return padded.reshape(shape).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


class KFAC(torch.optim.Optimizer):
    """``group``: where gradients are already summed; all its processes call ``step`` and ``state_dict`` together."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, group: dist.ProcessGroup | None = None) -> None:
        parameters = trainable(model)
        _check(parameters)
        super().__init__(
            parameters, {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay, "step": 0}
        )
        self.config, self.group = config, group
        self.rank, self.world = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
        self.blocks: list[Block] = []
        self._sums: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._edges: list[GradientEdge] = []  # the layers' outputs of the forward pass under way, for ``sample``
        self._sampling = self._sampled = False
        handles = []
        seen: set[int] = set()
        for module in model.modules():
            found = [b for b in blocks_of(module) if not seen & {id(p) for p in b.parameters}]
            seen |= {id(p) for b in found for p in b.parameters}
            if found:
                numbers = range(len(self.blocks), len(self.blocks) + len(found))
                handles.append(module.register_forward_hook(_forward_hook(weakref.ref(self), numbers)))
                self.blocks += found
        weakref.finalize(self, _remove, handles)  # the model outlives its optimisers
        self.cuts = [(Cut.of(b.d, config.max_factor), Cut.of(b.o, config.max_factor)) for b in self.blocks]
        self.owners = spread([self._cost(n) for n in range(len(self.blocks))], self.world)

    @property
    def everywhere(self) -> bool:
        return self.world == 1 or self.config.inverses == "everywhere"

    @property
    def measuring(self) -> bool:
        return bool(self.param_groups[0]["step"] % self.config.measure_every == 0)

    def _cost(self, number: int) -> float:
        """Of an eigendecomposition: the cube of its size."""
        block = self.blocks[number]
        return float(block.parts * sum(cut.count * cut.size**3 for cut in self.cuts[number]))

    # -- measurement, in the backward pass

    def observe(self, numbers: Sequence[int], x: Tensor, y: Tensor, gy: Tensor) -> None:
        """Adds one call of a layer (micro-batches add up): input, output, gradient of the GLOBAL mean loss."""
        live = reached(gy)
        if not bool(live.all()):
            x, y, gy = x[live], y[live], gy[live]
        if not len(gy):
            return
        dtype = self.blocks[numbers[0]].parameters[0].dtype
        x, y, gy = x.to(dtype), y.to(dtype), gy.to(dtype)
        for number in numbers:
            a, g = self.blocks[number].factors(x, y, gy)
            count = torch.full((1,), float(len(gy)), dtype=dtype, device=gy.device)
            before = self._sums.get(number)
            self._sums[number] = (a, g, count) if before is None else (before[0] + a, before[1] + g, before[2] + count)

    @property
    def samples(self) -> bool:
        """Whether this step's curvature comes from ``sample``."""
        return self.measuring and self.config.fisher == "sampled"

    def sample(self, loss: Tensor) -> None:
        """Measures by the gradients of ``loss``, of targets that the model drew, before the backward pass of the targets
        that it learns from; parameters' gradients stay as they are, the graph is kept."""
        self._sampling = True
        try:
            if self._edges:  # a model may have no layer of these kinds
                torch.autograd.grad(loss, self._edges, retain_graph=True, allow_unused=True)
        finally:
            self._sampling, self._edges = False, []
        self._sampled = True

    def scaled(self, factor: float) -> None:
        """The gradients that this step was measured by are those of the global mean loss times 1 / ``factor``."""
        self._sums = {n: (a, g * factor**2, count) for n, (a, g, count) in self._sums.items()}

    def _measured(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Sums of every block over all processes; this clears the local ones."""
        local = []
        for number, block in enumerate(self.blocks):
            like = block.parameters[0]
            local.append(
                self._sums.get(number)
                or (
                    like.new_zeros(block.parts, block.d, block.d),
                    like.new_zeros(block.parts, block.o, block.o),
                    like.new_zeros(1),
                )
            )
        self._sums = {}
        if self.group is not None:
            flat = torch.cat([t.detach().reshape(-1) for sums in local for t in sums])
            dist.all_reduce(flat, group=self.group)
            pieces = iter(flat.split([t.numel() for sums in local for t in sums]))
            local = [tuple(next(pieces).reshape(t.shape) for t in sums) for sums in local]  # type: ignore[misc]
        return local

    def _update_factors(self) -> None:
        """Running averages, of which the first measurements are plain means (Martens & Grosse, section 5)."""
        if self.samples and not self._sampled:
            raise ConfigError(
                "optimizer.fisher = 'sampled', and nobody sampled: only pretraining does",
                remedy="set optimizer.fisher=empirical",
            )
        self._sampled, self._edges = False, []
        sums = self._measured()
        if not sums:
            return
        examples = torch.stack([count for _, _, count in sums]).max()
        keep = min(1 - 1 / (self.param_groups[0]["step"] // self.config.measure_every + 1), self.config.decay)
        for block, cuts, (a, g, count) in zip(self.blocks, self.cuts, sums, strict=True):
            fresh = (cuts[0].blocks(a / count.clamp(min=1)), cuts[1].blocks(g * examples))
            if float(count) == 0 or not all(bool(torch.isfinite(f).all()) for f in fresh):
                continue  # a layer without a gradient, or a loss that is not finite: the trainer says so
            state = self.state[block.parameters[0]]
            for name, value in zip(FACTORS, fresh, strict=True):
                state[name] = state[name].mul_(keep).add_(value, alpha=1 - keep) if name in state else value

    # -- decomposition, spread over the processes

    def _decompose(self) -> None:
        for number, block in enumerate(self.blocks):
            if self.owners[number] == self.rank and FACTORS[0] in self.state[block.parameters[0]]:
                self._eigen(self.state[block.parameters[0]])
        if self.world > 1 and self.everywhere:
            self._share(lambda number: [self.state[self.blocks[number].parameters[0]].get(n) for n in DECOMPOSED])

    @staticmethod
    def _eigen(state: dict[str, Any]) -> None:
        for factor, vectors, values in zip(FACTORS, DECOMPOSED[::2], DECOMPOSED[1::2], strict=True):
            found, basis = torch.linalg.eigh(state[factor])
            # row by row, as a checkpoint holds it: another layout rounds otherwise
            state[vectors], state[values] = basis.contiguous(), found.clamp_(min=0)

    def _share(self, of: Callable[[int], list[Tensor | None]]) -> None:
        """Every owner's decompositions to everybody, one broadcast an owner."""
        assert self.group is not None
        for rank in range(self.world):
            mine = [n for n, owner in enumerate(self.owners) if owner == rank and self._has_factors(n)]
            if not mine:
                continue
            shapes = [(n, name, shape) for n in mine for name, shape in self._shapes(n)]
            like = self.blocks[mine[0]].parameters[0]
            if rank == self.rank:
                flat = torch.cat([t.reshape(-1) for n in mine for t in of(n) if t is not None])
            else:
                flat = like.new_empty(sum(shape.numel() for _, _, shape in shapes))
            dist.broadcast(flat, dist.get_global_rank(self.group, rank), group=self.group)
            pieces = flat.split([shape.numel() for _, _, shape in shapes])
            for (n, name, shape), piece in zip(shapes, pieces, strict=True):
                self.state[self.blocks[n].parameters[0]][name] = piece.reshape(shape).clone()

    def _has_factors(self, number: int) -> bool:
        return FACTORS[0] in self.state[self.blocks[number].parameters[0]]

    def _shapes(self, number: int) -> Iterator[tuple[str, torch.Size]]:
        for index, cut in enumerate(self.cuts[number]):
            lead = (self.blocks[number].parts, cut.count, cut.size)
            yield DECOMPOSED[2 * index], torch.Size((*lead, cut.size))
            yield DECOMPOSED[2 * index + 1], torch.Size(lead)

    # -- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        count = self.param_groups[0]["step"]
        if self.measuring:
            self._update_factors()
        if count % self.config.update_every == 0:
            self._decompose()
        directions = self._directions()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, directions.get(parameter, parameter.grad), group)
            group["step"] = count + 1
        return loss

    def _move(self, parameter: nn.Parameter, direction: Tensor, group: dict[str, Any]) -> None:
        """Momentum over preconditioned gradients; the decay of the weights is not preconditioned (Zhang et al. 2019)."""
        direction = direction.add(parameter, alpha=group["weight_decay"]) if group["weight_decay"] else direction
        if group["momentum"]:
            state = self.state[parameter]
            buffer = state.get("momentum_buffer")
            direction = direction.clone() if buffer is None else buffer.mul_(group["momentum"]).add_(direction)
            state["momentum_buffer"] = direction
        parameter.add_(direction, alpha=-group["lr"])

    def _directions(self) -> dict[Tensor, Tensor]:
        """(A (x) G + damping)^-1 grad of every block, clipped together by the change of the predictions."""
        usable = [n for n, b in enumerate(self.blocks) if self._usable(n, b)]
        matrices = {n: self.blocks[n].matrix() for n in usable}
        solved = {
            n: self._solve(n, m) if self.everywhere or self.owners[n] == self.rank else torch.zeros_like(m)
            for n, m in matrices.items()
        }
        if not self.everywhere and solved:  # each is zero but for its owner's, so that the sum is exact
            flat = torch.cat([m.reshape(-1) for m in solved.values()])
            dist.all_reduce(flat, group=self.group)
            pieces = flat.split([m.numel() for m in solved.values()])
            solved = {n: piece.reshape(m.shape) for (n, m), piece in zip(solved.items(), pieces, strict=True)}
        scale = self._clip(matrices, solved)
        found: dict[Tensor, Tensor] = {}
        for number, matrix in solved.items():
            block = self.blocks[number]
            found.update(zip(block.parameters, block.split(matrix * scale), strict=True))
        return found

    def _usable(self, number: int, block: Block) -> bool:
        return self._has_factors(number) and all(p.grad is not None for p in block.parameters)

    def _solve(self, number: int, matrix: Tensor) -> Tensor:
        """(B, o, d) -> the same, in the eigenbasis of the factors, where A (x) G + damping is diagonal."""
        state = self.state[self.blocks[number].parameters[0]]
        qa, la, qg, lg = (state[name] for name in DECOMPOSED)
        cut_a, cut_g = self.cuts[number]
        rows, columns = cut_g.count * cut_g.size - cut_g.dim, cut_a.count * cut_a.size - cut_a.dim
        m = nn.functional.pad(matrix, (0, columns, 0, rows))
        m = m.reshape(len(m), cut_g.count, cut_g.size, cut_a.count, cut_a.size)
        m = torch.einsum("bgpaq,bgpr,baqs->bgras", m, qg, qa)
        m = m / (lg[..., None, None] * la[:, None, None] + self.config.damping)
        m = torch.einsum("bgras,bgpr,baqs->bgpaq", m, qg, qa)
        return m.reshape(len(m), cut_g.dim + rows, cut_a.dim + columns)[:, : cut_g.dim, : cut_a.dim]

    def _clip(self, matrices: dict[int, Tensor], solved: dict[int, Tensor]) -> float:
        """min(1, sqrt(kl_clip / (lr^2 sum grad . direction))): Ba et al. (ICLR 2017), section 5."""
        lr = self.param_groups[0]["lr"]
        if not self.config.kl_clip or not lr or not solved:
            return 1.0
        change = lr**2 * float(torch.stack([(matrices[n] * solved[n]).sum() for n in solved]).sum())
        return min(1.0, (self.config.kl_clip / change) ** 0.5) if change > 0 else 1.0

    # -- the state

    def state_dict(self) -> dict[str, Any]:
        """Whole on every rank: where each keeps its own decompositions, they are gathered, so every rank must call."""
        if not self.everywhere:
            self._share(lambda number: [self.state[self.blocks[number].parameters[0]][n] for n in DECOMPOSED])
        document: dict[str, Any] = super().state_dict()
        document["state"] = {index: dict(entries) for index, entries in document["state"].items()}
        self._forget()
        return document

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._sums = {}
        self._forget()

    def _forget(self) -> None:
        """Drops what another process keeps for us."""
        if self.everywhere:
            return
        for number, block in enumerate(self.blocks):
            if self.owners[number] != self.rank:
                for name in DECOMPOSED:
                    self.state[block.parameters[0]].pop(name, None)


def spread(costs: Sequence[float], world: int) -> list[int]:
    """Block -> rank: the dearest first, each to the rank with the least to do (Graham 1969). The same on every rank."""
    loads, owners = [0.0] * world, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        owners[number] = min(range(world), key=lambda r: (loads[r], r))
        loads[owners[number]] += costs[number]
    return owners


def _check(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        if type(parameter.data) is not Tensor:
            raise ConfigError(
                f"optimizer.name = 'kfac' needs whole parameters on every process, not {type(parameter.data).__name__}",
                remedy="use plain data parallelism with K-FAC, or adamw, lamb or soap with sharded parameters",
            )
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                f"optimizer.name = 'kfac' needs float32 or float64 parameters, not {parameter.dtype}",
                remedy="compute in bfloat16 by autocast, and keep the parameters in float32",
            )


def _forward_hook(optimizer: weakref.ref[KFAC], numbers: Sequence[int]) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        kfac = optimizer()
        if kfac is None or not module.training or not output.requires_grad or not kfac.measuring:
            return
        if current().recomputed:  # the outputs that gradients go through were seen before
            return
        x, y = arguments[0].detach(), output.detach()

        def measure(gradient: Tensor) -> None:
            if kfac._sampling or kfac.config.fisher == "empirical":
                kfac.observe(numbers, x, y, gradient.detach())

        output.register_hook(measure)
        if kfac.samples:
            kfac._edges.append(get_gradient_edge(output))  # now: what follows may change the output in place

    return hook


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
