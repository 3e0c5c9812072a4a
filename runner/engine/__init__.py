"""The engine: one process per model, the only room where MLX is imported. `README.md` here walks through it."""

from runner.engine.upstream import install_bare_package

# Before any module of this package can import from mlx_lm.
install_bare_package()
