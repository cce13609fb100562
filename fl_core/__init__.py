"""The ground floor: imports no other room."""
