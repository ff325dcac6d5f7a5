"""What a training left behind: its event files, hooks, states."""

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(folder):
    """{tag: {step: value}} of the event files below a folder."""
    found = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return found


def hooks(model):
    tables = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
    return sum(len(getattr(module, table)) for module in model.modules() for table in tables)


def plain(state):
    """A state with lists for tensors, that == can compare."""
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, torch.Tensor) else state
