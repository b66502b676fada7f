"""A model directory without weights: enough to make vLLM's configuration from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_MAKE = """
import sys
from demo import model
model.config("dense", trained=False).save_pretrained(sys.argv[1])
model.write_tokenizer(sys.argv[1])
"""


def make(directory: Path) -> str:
    """Write the demo model's configuration and tokenizer into `directory`; return its name."""
    subprocess.run([sys.executable, "-c", _MAKE, str(directory)], cwd=ROOT, check=True, timeout=300)
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {"architectures": ["DeepseekV3ForCausalLM"]}
    path.write_text(json.dumps(config))
    return str(directory)
