"""Training that starts from a whole network, and parts of it that do not learn."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from m2f.weights.any import CLASS_HEAD, PIXEL_DECODER, Loaded

KEPT_CLASSES = "kept_classes"
"""In a file to start from: which rows of its class head are taken over, (C + 1,) uint8; without it, all."""


def start_tensors(
    loaded: Loaded, classes: Sequence[str], *, known: Sequence[str] = (), rule: str = "same"
) -> tuple[dict[str, Tensor], str]:
    """What a network of these classes starts from, for `start_network`, and in words what is kept and begins anew.

    `rule`: "same": the class head is taken over; "anew": it begins anew; "match": classes of the same name among
    `known`, the checkpoint's classes, are taken over, and so is "no object". ValueError where `known` are not as many
    as the checkpoint's classes.
    """
    tensors = dict(loaded.tensors)
    if rule == "same":
        head = " and class head"
    elif rule == "anew":
        for name in CLASS_HEAD:
            del tensors[name]
        head = f"; the class head begins anew, with {len(classes)} classes instead of {loaded.num_classes}"
    else:
        if len(known) != loaded.num_classes:
            raise ValueError(f"the checkpoint has {loaded.num_classes} classes, but class_names lists {len(known)}")
        kept = [name for name in classes if name in known]
        rows = torch.tensor([known.index(name) if name in known else -1 for name in classes] + [loaded.num_classes])
        for name in CLASS_HEAD:
            tensors[name] = tensors[name][rows]
        tensors[KEPT_CLASSES] = (rows >= 0).to(torch.uint8)
        listed = f" ({', '.join(kept[:5])}{', ...' if len(kept) > 5 else ''})" if kept else ""
        head = f", no-object and {len(kept)} of {len(classes)} classes{listed}"
        head += "; other classes begin anew" if len(kept) < len(classes) else ""
    missing = loaded.missing
    anew = not any(name.startswith(PIXEL_DECODER) for name in tensors)
    if anew:
        missing = tuple(name for name in missing if not name.startswith(PIXEL_DECODER))
    lacking = f"; entries that it lacks begin anew: {', '.join(missing)}" if missing else ""
    parts = "backbone, query decoder" if anew else "backbone, pixel decoder, query decoder"
    return tensors, f"{parts}{head}{lacking}{'; the pixel decoder, another one, begins anew' if anew else ''}"


def start_network(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors of `start_tensors` into a network; what they lack stays as it is.

    ValueError for an entry that the network lacks or that has another shape.
    """
    own = model.state_dict()
    kept = tensors.get(KEPT_CLASSES)
    given = {name: tensor for name, tensor in tensors.items() if name != KEPT_CLASSES}
    wrong = [name for name, tensor in given.items() if name not in own or own[name].shape != tensor.shape]
    if wrong:
        raise ValueError(
            f"the initial weights belong to another network: {len(wrong)} entries do not fit, first {wrong[0]}; "
            "make them again with dvc repro -f weights@<name>"
        )
    if kept is not None:
        for name in CLASS_HEAD:
            anew = kept.to(own[name].device) == 0
            given[name] = given[name].to(own[name].device).clone()
            given[name][anew] = own[name][anew]
    model.load_state_dict(given, strict=False)


def freeze(model: nn.Module, parts: Collection[str]) -> None:
    """Keep parts of the network as they are: no gradients, and batch norm on its running statistics. To be called again
    after `model.train()`, which puts batch norm on the batch's."""
    for part in parts:
        module = model.get_submodule(part).requires_grad_(False)
        for each in module.modules():
            if isinstance(each, nn.modules.batchnorm._BatchNorm):
                each.eval()
