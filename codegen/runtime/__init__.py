"""What a built wheel carries: the core, the kernel table and the operators. Imports torch and the standard library only."""
