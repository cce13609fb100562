"""Flower's types as this project uses them: messages, the streaming Grid, and the one adapter to private names."""

from fl_core.contracts.offswitches import set_off_switches

set_off_switches()
