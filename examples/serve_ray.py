# SPDX-License-Identifier: Apache-2.0
"""An OpenAI server of as many engines as it takes: ``MODEL=… serve run examples.serve_ray:app``."""

import os

from ray.serve.llm import LLMConfig, build_openai_app

from kvcompress_vllm.ray import engine_kwargs

model = os.environ.get("MODEL", "meta-llama/Llama-3.1-8B-Instruct")
config = LLMConfig(
    model_loading_config={"model_id": os.path.basename(model), "model_source": model},
    deployment_config={
        "autoscaling_config": {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 64}
    },
    engine_kwargs={**engine_kwargs(ratio=8), "max_model_len": 2048},
)
app = build_openai_app({"llm_configs": [config]})
