"""Small model folders, written by hand from the description of the format: no Transformers, no writer of ours."""

import json

import torch
from safetensors.torch import load_file, save_file

from matgptq.planes import pack_planes

ROWS, COLUMNS, GROUP = 8, 64, 32


def layer_tensors(name, seed=0, planes=None, zeros=None, perm=False, own=(), bias=False, top=256):
    """A layer's tensors by stored name; ``planes``: width of the bit planes, None for codes below ``top``."""
    random = torch.Generator().manual_seed(seed)
    groups = (ROWS, COLUMNS // GROUP)
    codes = torch.randint(0, top if planes is None else 2**planes, (ROWS, COLUMNS), generator=random).to(torch.uint8)
    tensors = {"qweight": codes if planes is None else pack_planes(codes, planes)}
    for suffix in ("scales", *(f"scales_{bits}" for bits in own)):
        tensors[suffix] = (torch.rand(groups, generator=random) * 0.02 + 0.001).half()
    if zeros is not None:
        tensors["zeros"] = torch.randint(64, 192, groups, generator=random).to(zeros)
    if perm:
        tensors["perm"] = torch.randperm(COLUMNS, generator=random).int()
    if bias:
        tensors["bias"] = torch.randn(ROWS, generator=random).half()
    return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}


def healthy():
    """Tensors of two layers and a norm."""
    return {**layer_tensors("m.up"), **layer_tensors("m.down", seed=1), "m.norm.weight": torch.ones(COLUMNS).half()}


def config_values(**changes):
    """Our quantization_config for the layers above."""
    return {"quant_method": "matgptq", "bits": 8, "group_size": GROUP} | changes


def write_folder(folder, tensors, quantization, shards=1):
    """Write ``tensors`` to ``shards`` files, one after another in turn, with an index if there are several."""
    folder.mkdir()
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    names = ["model.safetensors"] if shards == 1 else names
    places = {name: names[i % shards] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({name: tensors[name] for name in tensors if places[name] == file}, folder / file)
    if shards > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    write_json(folder / "config.json", {"model_type": "llama", "quantization_config": quantization})
    return folder


def write_json(path, values):
    path.write_text(json.dumps(values), encoding="utf-8")


def read_tensors(folder):
    """Every tensor of a folder by name."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
