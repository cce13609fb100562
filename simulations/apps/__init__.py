"""Unmodified Flower projects (a ServerApp and a ClientApp) over our own Grid and worker processes."""
