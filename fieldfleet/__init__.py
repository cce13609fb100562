"""The face: composes each room's commands; owns demo, evaluate, doctor, apps."""
