"""EleutherAI's lm-evaluation-harness with this project's checkpoints and packages.

    python -m melt_export.lm_eval run --model hf --model_args pretrained=CHECKPOINT --tasks TASK
    python -m melt_export.lm_eval run --model melt_run --model_args package=PACKAGE --tasks TASK

It is the ``lm_eval`` command, for which transformers knows the models here and the harness knows ``melt_run``.
"""

from __future__ import annotations

import melt_models.checkpoint  # noqa: F401 - registers every model with transformers
import melt_runtime.lm_eval

__all__ = ["main"]


def main() -> None:
    """Run the harness's command."""
    melt_runtime.lm_eval.cli_evaluate()


if __name__ == "__main__":
    main()
