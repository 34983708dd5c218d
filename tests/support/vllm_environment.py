"""Environment variables of processes of vLLM on a CPU."""

from pathlib import Path

SITE = Path(__file__).parents[1] / "vllm_site"
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONPATH": str(SITE),
}
# GiB, where vllm_site/worker.py does not ask for less
SPACE = {"VLLM_CPU_KVCACHE_SPACE": "1"}
