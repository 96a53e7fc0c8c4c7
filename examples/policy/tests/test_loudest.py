# SPDX-License-Identifier: Apache-2.0
"""Without an engine: pip install . pytest && pytest tests"""

import pytest
import torch

from kvcompress_vllm import KVCompressConfig, ops
from kvcompress_vllm.policies import create
from kvcompress_vllm.policies.trial import check, evidence

CONFIG = KVCompressConfig.from_dict({"policy": "loudest"})


def test_scores_are_accepted():
    """Shapes, types and finite numbers on made-up keys: what the engine checks before it starts."""
    check("loudest", CONFIG)


def test_a_loud_key_is_above_the_others():
    policy = create("loudest", pool=1, options={"mean": 0.0})
    made_up = evidence(policy, CONFIG, num_keys=256, num_kept=64, packed=False)
    made_up.statistics[ops.MAXIMUM][:, 100] = 2.0
    assert (policy.score(made_up).argmax(-1) == 100).all()


def test_options_are_checked():
    with pytest.raises(ValueError, match="mean=-1 is not accepted"):
        create("loudest", pool=1, options={"mean": -1})
    assert torch.get_default_dtype() == torch.float32
