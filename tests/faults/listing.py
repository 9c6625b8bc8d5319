"""The list of faults, and what many of them change."""

from ds4mlx.model.rope import Rotary

FAULTS = []
STORAGE_FAULTS = []  # those of them that need the weights in their stored form


def fault(function):
    """Put a function on the list."""
    FAULTS.append(function)
    return function


def storage_fault(function):
    """Put a function on both lists."""
    STORAGE_FAULTS.append(function)
    return fault(function)


def with_ratio(model, *ratios):
    """The attention modules of the layers with one of these ratios."""
    return [b.attn for b in model.layers if b.attn.ratio in ratios]


def change(patch, modules, name, function):
    """Replace parameter `name` of every module by function(parameter)."""
    for module in modules:
        patch.setitem(module, name, function(module[name]))


def experts(model):
    return [b.ffn.experts for b in model.layers]


def retable(patch, model, ratios, compressed, **rope):
    """Give the layers of some ratios a rotary table of another configuration."""
    config = model.args
    if "scaling" in rope:
        scaling = config.rope_scaling.model_copy(update=rope.pop("scaling"))
        config = config.model_copy(update={"rope_scaling": scaling})
    table = Rotary(config.model_copy(update=rope), compressed)
    for ratio in ratios:
        patch.setitem(model._rotary, ratio, table)
