# SPDX-License-Identifier: Apache-2.0
"""Print one sample as the body of a completions request, and its answer to stderr.

python -m benchmarks.retrieval TASK LENGTH SEED > request.json
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.retrieval import TaskGen

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("task")
parser.add_argument("length", type=int, help="tokens, answer included")
parser.add_argument("seed", type=int)
parser.add_argument("--model", default=str(Path(__file__).parents[2] / "models" / "tiny"))
args = parser.parse_args()
try:
    prompt, answer = TaskGen.load(args.model).task(args.task, args.length, args.seed)
except ValueError as error:
    parser.error(str(error))
print(json.dumps({"model": "tiny", "prompt": prompt, "max_tokens": 16, "temperature": 0}))
print(f"answer: {answer}", file=sys.stderr)
