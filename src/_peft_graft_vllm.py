"""Register the weight transfer engine `peft_graft` with vLLM, without waiting for PEFT.

vLLM calls `register` in every one of its processes, also of engines that never see a graft. It is told the names of a
module and a class, and imports them when an engine with this backend starts.
"""

from functools import cache


@cache  # vLLM refuses a second engine of the same name
def register() -> None:
    """Register the engine, where vLLM can take one: from 0.33 on. An older one refuses the backend by its name."""
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ImportError:
        return
    WeightTransferEngineFactory.register_engine("peft_graft", "peft_graft.vllm.engine", "GraftWeightTransferEngine")
