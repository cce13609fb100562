"""Simulations on a Ray cluster: the same engine, its workers on other machines."""
