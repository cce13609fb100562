"""One folder per application, each with the same files; applications never import each other."""
