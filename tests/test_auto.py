"""``import melt_models`` is all that transformers' Auto classes need, in any order, and stays quick."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import LIMIT

DEMO = Path(__file__).parent.parent / "examples" / "addition-melt"
LOADS = f"""
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(DEMO)!r})
import melt_models
assert type(model) is melt_models.MeltForCausalLM, type(model)
"""


@pytest.mark.parametrize(
    "first",
    [
        "import melt_models; import sys; assert not {'torch', 'transformers'} & set(sys.modules)",
        "import transformers; import melt_models",
        "from transformers import AutoModelForCausalLM; import melt_models",
        "import melt_models.core",
        "import melt_models; from transformers.models.llama import modeling_llama",
    ],
)
def test_auto_classes_know_the_models_after_one_import(first: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"{first}\n{LOADS}"], capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_config_alone_is_known_too() -> None:
    code = f"""
import melt_models
from transformers import AutoConfig
assert type(AutoConfig.from_pretrained({str(DEMO)!r})).__name__ == "MeltConfig"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_documents_snippets_run_as_written(tmp_path: Path) -> None:
    page = (DEMO.parent.parent / "docs" / "transformers.md").read_text(encoding="utf-8")
    snippets = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "not run" not in code]
    (tmp_path / "examples").symlink_to(DEMO.parent)
    code = "\n".join(snippets)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "5401747+2556359=7958106"
