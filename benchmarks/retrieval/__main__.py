# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.retrieval TASK LENGTH SEED``: one sample as JSON, prompt and answer."""

import argparse
import json
from pathlib import Path

from benchmarks.retrieval import TaskGen

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("task")
parser.add_argument("length", type=int, help="tokens, answer included")
parser.add_argument("seed", type=int)
parser.add_argument("--model", default=str(Path(__file__).parents[2] / "models" / "tiny"))
args = parser.parse_args()
prompt, answer = TaskGen.load(args.model).task(args.task, args.length, args.seed)
print(json.dumps({"prompt": prompt, "answer": answer}))
