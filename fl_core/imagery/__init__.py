"""Pictures that more than one application needs: photographs read safely, and crop fields drawn by rule. Torch-free."""
