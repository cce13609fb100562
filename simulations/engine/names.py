"""The names of the ways to do local updates; imports nothing, for the command line."""

AUTO, SEQUENTIAL = "auto", "sequential"
ENGINES = (AUTO, SEQUENTIAL)
