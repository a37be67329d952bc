"""The task types of PEFT, with the names that the Hub, transformers and PEFT have for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TaskNames:
    """Names that belong to one task type.

    Args:
        pipeline_tag: The Hub's tag, None where several would do.
        peft_class: Class of PEFT that loads base and adapter at once.
        auto_class: Class of transformers that loads the base.
        mapping: Table in `transformers.models.auto.modeling_auto` of the model classes for the task, None for any.
        late_modules: Modules to save that PEFT names only after the graft is made, in the config that the user passed.
    """

    pipeline_tag: str | None
    peft_class: str
    auto_class: str
    mapping: str | None
    late_modules: tuple[str, ...] = ()


TASK_TYPES = {
    "SEQ_CLS": TaskNames(
        "text-classification",
        "AutoPeftModelForSequenceClassification",
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
    "TOKEN_CLS": TaskNames(
        "token-classification",
        "AutoPeftModelForTokenClassification",
        "AutoModelForTokenClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
        ("classifier", "score"),
    ),
    "QUESTION_ANS": TaskNames(
        "question-answering",
        "AutoPeftModelForQuestionAnswering",
        "AutoModelForQuestionAnswering",
        "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
        ("qa_outputs",),
    ),
    "CAUSAL_LM": TaskNames(
        "text-generation",
        "AutoPeftModelForCausalLM",
        "AutoModelForCausalLM",
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    ),
    "SEQ_2_SEQ_LM": TaskNames(
        None,
        "AutoPeftModelForSeq2SeqLM",
        "AutoModelForSeq2SeqLM",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    ),
    "FEATURE_EXTRACTION": TaskNames("feature-extraction", "AutoPeftModelForFeatureExtraction", "AutoModel", None),
}


def task_names(task_type: Any) -> TaskNames | None:
    """Return the names of a task type.

    Args:
        task_type: PEFT's `TaskType`, its name, or None.

    Returns:
        The names, None for no task type or an unknown one.
    """
    return TASK_TYPES.get(str(getattr(task_type, "value", task_type)))
