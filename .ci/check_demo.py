"""Fails where the demo's distillation did not pay: python .ci/check_demo.py runs/demo/demo.json"""

import json
import sys
from pathlib import Path

GAIN = 4.0  # points of top-1 that distillation must add to the student's start

found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
gain = found["distilled"] - found["start"]
if gain < GAIN:
    sys.exit(f"{sys.argv[1]}: distillation gained {gain:.2f} points of top-1, less than {GAIN}")
if found["distilled"] <= found["same_labels_longer"]:
    sys.exit(f"{sys.argv[1]}: distilled {found['distilled']:.2f}, no more than the control on the same labels")
print(f"{sys.argv[1]}: {gain:.2f} points gained, and above the control on the same labels")
