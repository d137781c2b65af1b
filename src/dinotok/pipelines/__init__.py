"""One `DiffusionPipeline` each, in the files that go to the Hub.

In a checkout they lie in `pipelines/` beside `src/`; a wheel carries them here.
"""

from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[3]
if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "src" / "dinotok").is_dir():
    __path__.append(str(_CHECKOUT / "pipelines"))
