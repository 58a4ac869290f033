"""Makes the Triton files importable as `detr_fast.kernels.<name>`, installed or run from the repository.

A wheel carries them in `detr_fast/kernels/`; in the repository, and so after `pip install -e .`, they are in the
top-level `kernels/`. Neither has an `__init__.py` (kernels/README.md says why), so Python takes this module for the
package itself.
"""

from __future__ import annotations

from pathlib import Path

_package = Path(__file__).resolve().parent
__path__ = [str(next(path for path in (_package / "kernels", _package.parent / "kernels") if path.is_dir()))]
