"""Modules that the launcher imports before it forks hosts, and symbols of vLLM that forked hosts use."""

from inference_service.config import Backend

# The module whose `run` serves a model in a host (hosts/__init__.py).
PROGRAMS = {
    Backend.VLLM: "inference_service.hosts.vllm.server",
    Backend.TRANSFORMERS: "inference_service.hosts.transformers.server",
    Backend.FAKE: "inference_service.hosts.fake",
}


# What a host of each backend imports. A missing module only makes hosts slower; except for the first, without
# which the backend cannot run.
PRELOAD = {
    Backend.VLLM: (
        "vllm.v1.engine.core",
        "vllm.v1.engine.async_llm",
        "vllm.v1.executor.uniproc_executor",
        "vllm.entrypoints.launchers.api_server.entry",
        "vllm.entrypoints.launchers.cli_args",
        "vllm.entrypoints.generate.api_router",
        "vllm.model_executor.models.llama",
        "vllm.model_executor.models.qwen2",
        "vllm.reasoning",
        "vllm.tool_parsers",
        PROGRAMS[Backend.VLLM],
    ),
    Backend.TRANSFORMERS: (
        PROGRAMS[Backend.TRANSFORMERS],
        "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama",
        "transformers.models.qwen2.modeling_qwen2",
        "peft",
    ),
    Backend.FAKE: (PROGRAMS[Backend.FAKE],),
}


# What vLLM's workers import on a certain device.
PRELOAD_VLLM = {
    "cpu": ("vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu_model_runner"),
    "cuda": ("vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu.model_runner"),
}


# Symbols of vLLM that forked hosts use beyond its command line and its server's entry points.
EXPECTED = {
    "vllm.v1.engine.utils": ("get_mp_context",),
    "vllm.v1.engine.core": ("EngineCoreProc",),
    "vllm.model_executor.models.registry": ("_run_in_subprocess",),
    "vllm.v1.worker.gpu_worker": ("Worker",),
}
