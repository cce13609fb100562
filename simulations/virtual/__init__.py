"""Federations on a virtual clock: devices of different speed, links and reliability, in seconds that nobody waits."""
