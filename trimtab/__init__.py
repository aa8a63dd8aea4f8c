"""Value-guided decoding (MAVIS) in `plugins` and `trainers`, black-box optimisation (CONGO) in
`optimizers`. Nothing is imported here: each of them has dependencies of its own."""

from pathlib import Path

__version__ = "0.1.0"

# In a clone the packages lie beside this folder, not in it; an installed wheel has them here.
if Path(__file__).parents[1].joinpath("pyproject.toml").exists():
    __path__.append(str(Path(__file__).parents[1]))
