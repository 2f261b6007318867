"""The part that a built wheel carries: core, kernel table, operators. Imports torch and the standard library only."""
