"""The stages, apart from steps: the commands are named after them and start without what a step needs."""

from enum import StrEnum


class Stage(StrEnum):
    """The kinds of steps, in the order of their first one."""

    SFT = "sft"
    ROLLOUT = "rollout"
    TEACHER_SCORE = "teacher-score"
    TRAIN = "train"
    EVALUATE = "evaluate"
