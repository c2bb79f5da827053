"""What other people's files look like: JSON, tensors, model folders, adapters. No mathematics here.

Tensors come from safetensors files and from what `torch.save` wrote. Both are mapped, not read: a
tensor's bytes leave the disk when they are used. Models and adapters are given under Hugging Face's
names, whoever wrote them. Whatever a file claims is checked before it is believed: a broken or
hostile one ends in a ValueError of one line, and nothing in it is ever run.
"""
import json
import math
import mmap
import os
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}
JSON_LIMIT = 10_000_000  # bytes; the largest model's is well below a tenth of it


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary name beside `path`), then rename: `path` is old or new, never half."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: dict) -> None:
    text = json.dumps(value, indent=2) + "\n"
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises FileNotFoundError, ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if (size := path.stat().st_size) > JSON_LIMIT:
        raise ValueError(f"{path}: {size:,} bytes are too many for a file of settings")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


# --------------------------------------------------------------------------------------------------
# Reading tensors


def tensor_files(folder: Path, *names: str) -> list[Path]:
    """The first of `names` that the folder has, whole or as the shards that NAME.index.json lists.

    Raises FileNotFoundError if there is none or a shard is missing, and ValueError for an index
    that is broken or names a file outside its folder.
    """
    for name in names:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if not index.is_file():
            continue
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
            raise ValueError(f'{index}: expected a "weight_map" from tensors to file names')
        for shard in (shards := sorted(set(shards.values()))):
            if os.path.basename(shard) != shard:
                raise ValueError(f"{index}: names {shard!r}, which is not in its folder")
            if not os.path.isfile(folder / shard):
                raise FileNotFoundError(f"{index}: names {shard!r}, which is missing")
        return [folder / shard for shard in shards]
    raise FileNotFoundError(f"{folder}: has none of {', '.join(names)}, nor an index of shards")


def read_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor, one after the other, from a safetensors file or one of `torch.save`."""
    yield from (read_safetensors if path.suffix == ".safetensors" else read_pickled)(path)


def read_safetensors(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The names and tensors of a safetensors file, in the file's order.

    The form: 8 bytes with the header's length N (little endian), N bytes of JSON {name: {dtype,
    shape, data_offsets}}, the data. Raises FileNotFoundError, and ValueError if the header does not
    describe exactly this file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, JSON_LIMIT):
            raise ValueError(f"{path}: not a safetensors file, or cut short (its header claims "
                             f"{length} bytes of {size})")
        try:
            header = json.loads(file.read(length), object_pairs_hook=unique_names)
            entries = [read_entry(*item) for item in header.items() if item[0] != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}: broken safetensors header ({problem})") from None
        # Private: what is written to a tensor stays in this process.
        data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    end = first = 8 + length
    for start, stop, name, dtype, shape in (entries := sorted(entries, key=lambda e: e[:3])):
        if first + start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: {name}: bytes {start} to {stop} do not fit {dtype} of shape "
                             f"{shape} behind {end - first} bytes of other tensors")
        end = first + stop
    if end != size:
        raise ValueError(f"{path}: its tensors end at byte {end}, the file at {size}")
    for start, stop, name, dtype, shape in entries:
        yield from map_tensor(data, name, first + start, stop - start, dtype, shape)


def unique_names(pairs: list) -> dict:
    if len(names := dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return names


def is_name(name: object) -> bool:
    return type(name) is str and len(name) <= 200 and name.isprintable()


def is_shape(shape: list[int] | tuple[int, ...]) -> bool:
    """Not so large, nor of so many dimensions, that PyTorch could not count its elements."""
    return len(shape) <= 8 and min(shape, default=0) >= 0 and math.prod(
        n or 1 for n in shape) < 1 << 60


def read_entry(name: str, entry: dict) -> tuple[int, int, str, torch.dtype, list[int]]:
    if not is_name(name):
        raise ValueError(f"{name[:200]!r} is no tensor's name")
    (start, stop), shape = entry["data_offsets"], entry["shape"]
    if type(shape) is not list or not all(
            type(n) is int and 0 <= n < 1 << 62 for n in (start, stop, *shape)):
        raise ValueError(f"{name}: shape and offsets must be whole numbers")
    if not is_shape(shape):
        raise ValueError(f"{name}: no tensor has shape {shape[:8]}")
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name}: dtype {str(entry['dtype'])[:40]!r} is not supported")
    return start, stop, name, DTYPES[entry["dtype"]], shape


def map_tensor(data: mmap.mmap, name: str, start: int, length: int, dtype: torch.dtype,
               shape: list[int], stride: list[int] | None = None,
               offset: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor in `length` bytes of a mapped file; these are copied only where misaligned."""
    flat = torch.empty(0, dtype=dtype)
    if length:
        aligned = start % dtype.itemsize == 0
        kind = dtype if aligned else torch.uint8
        flat = torch.frombuffer(data, dtype=kind, offset=start, count=length // kind.itemsize)
        flat = flat if aligned else flat.clone().view(dtype)
    yield name, flat.view(shape) if stride is None else flat.as_strided(shape, stride, offset)
    if length:  # what was copied need not stay in memory; what was not comes back when it is used
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        data.madvise(mmap.MADV_DONTNEED, page, start + length - page)


class Global(str):
    """The class or function of a pickle, by name. It is never imported."""


class Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    numel: int


class View(NamedTuple):
    """A tensor: a view of a storage."""
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16,
    "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
    "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool}


def read_pickled(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The names and tensors that `torch.save` wrote, in its zip form or the one before 2020.

    Not by `torch.load`: even with `weights_only=True` it copies the older form into memory, and
    there are files that crash it, hang it, or come out as whatever was in memory. Raises
    FileNotFoundError, and ValueError for all that is not tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            tensors, starts = (locate_zipped if zipfile.is_zipfile(file) else locate_older)(file)
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if not isinstance(tensors, dict):
            raise ValueError("a dict of tensors by name is expected")
        for name, view in tensors.items():
            if not isinstance(view, View):
                raise ValueError(f"{name!r} is no tensor")
            (dtype, key, numel), offset, shape, stride = view
            last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
            length, start = numel * dtype.itemsize, starts[key]
            if (not is_shape(shape) or min(offset, numel, *stride) < 0
                    or max(offset, 0, *stride) >= 1 << 62 or start + length > len(data)
                    or math.prod(shape) > numel or last >= numel > 0):
                raise ValueError(f"{name!r} does not fit its bytes")
    except Exception as error:  # what a broken file leads the readers of its parts to
        problem = str(error) or type(error).__name__
        raise ValueError(f"{path}: not a file of tensors, or broken ({problem[:200]})") from None
    for name, (storage, offset, shape, stride) in tensors.items():
        length = storage.numel * storage.dtype.itemsize
        yield from map_tensor(data, name, starts[storage.key], length, storage.dtype, shape, stride,
                              offset)


def locate_zipped(file: BinaryIO) -> tuple[object, dict[str, int]]:
    """A zip's unpickled data.pkl, and where in the file the bytes of each storage start."""
    with zipfile.ZipFile(file) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        folder, starts = name.removesuffix("data.pkl"), {}
        members = {member.filename: member for member in archive.infolist()}
        order = members.get(folder + "byteorder", name)
        if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
            raise ValueError("compressed")
        if order != name and archive.read(order) != b"little":
            raise ValueError("not little endian")
        with archive.open(name) as pickle:
            value, storages = unpickle(pickle)
        for key, storage in storages.items():
            member = members[f"{folder}data/{key}"]
            if member.file_size != storage.numel * storage.dtype.itemsize:
                raise ValueError(f"storage {key} has {member.file_size} bytes")
            file.seek(member.header_offset + 26)  # the lengths of two fields, behind which it is
            lengths = file.read(4)
            starts[key] = member.header_offset + 30 + sum(
                int.from_bytes(lengths[i:i + 2], "little") for i in (0, 2))
    return value, starts


def locate_older(file: BinaryIO) -> tuple[object, dict[str, int]]:
    """The same for the form before 2020: five pickles, then length and bytes of each storage."""
    file.seek(0)
    if unpickle(file)[0] != 0x1950a86a20f9469cfc6c:
        raise ValueError("it does not begin as torch.save's files do")
    unpickle(file)  # the version of the form
    if unpickle(file)[0].get("little_endian") is not True:
        raise ValueError("not little endian")
    (value, storages), (keys, _), starts = unpickle(file), unpickle(file), {}
    for key in keys:
        numel, starts[key] = int.from_bytes(file.read(8), "little"), file.tell()
        if numel != storages[key].numel:
            raise ValueError(f"storage {key} has {numel} elements")
        file.seek(numel * storages[key].dtype.itemsize, os.SEEK_CUR)
    return value, starts


def unpickle(file: BinaryIO) -> tuple[object, dict[str, Storage]]:
    """One pickle as `torch.save` writes them, with `View` for tensors; and its storages by key."""
    stack, marks, memo, storages = [], [], {}, {}
    constants = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}

    def pop(n: int | None = None) -> list:
        """The last n values, or those since the last mark."""
        n = len(stack) - marks.pop() if n is None else n
        if n > len(stack) - (marks[-1] if marks else 0):
            raise ValueError("broken pickle")
        values = stack[len(stack) - n:]
        del stack[len(stack) - n:]
        return values

    def storage(kind: str, name: Global, key: str, _: str, numel: int, *view: None) -> Storage:
        found = Storage(STORAGES[name.removeprefix("torch ").removesuffix("Storage")], key, numel)
        if kind != "storage" or type(key) is not str or type(numel) is not int or any(view):
            raise ValueError("broken storage")
        if storages.setdefault(key, found) != found:
            raise ValueError(f"storage {key!r} is two things")
        return found

    def call(function: Global, arguments: tuple) -> object:
        if type(function) is not Global or type(arguments) is not tuple:
            raise ValueError("it calls what is no function")
        if function == "collections OrderedDict" and not arguments:
            return {}
        if function == "torch._utils _rebuild_parameter":
            return arguments[0]
        if function == "torch._utils _rebuild_tensor_v2" and type(arguments[0]) is Storage:
            view = View(*arguments[:4])
            if all(type(n) is int for n in (view.offset, *view.shape, *view.stride)):
                return view
        raise ValueError(f"it calls {str(function)[:100]!r}")

    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name == "STOP":
            return *pop(1), storages
        elif name in ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"):
            stack.append(argument)
        elif name in constants:
            stack.append(constants[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name == "GLOBAL":
            stack.append(Global(argument))
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(pop(None if name == "TUPLE" else int(name[-1]))))
        elif name in ("APPEND", "APPENDS"):
            values = pop(1 if name == "APPEND" else None)
            stack[-1].extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            items = pop(2 if name == "SETITEM" else None)
            for key, value in zip(items[::2], items[1::2], strict=True):
                if not is_name(key):
                    raise ValueError("a key that is no name")
                stack[-1][key] = value
        elif name == "BINPERSID":
            stack.append(storage(*pop(1)[0]))
        elif name == "REDUCE":
            stack.append(call(*pop(2)))
        elif name == "BUILD":  # attributes of a dict: the versions of a state dict's modules
            pop(1)
        elif name != "PROTO":
            raise ValueError(f"a pickle with {name} in it")
    raise ValueError("a pickle without an end")


# --------------------------------------------------------------------------------------------------
# Writing tensors


def write_safetensors(tensors: dict[str, torch.Tensor], path: Path | None,
                      get: Callable[[str], torch.Tensor] | None = None) -> None:
    """Write a safetensors file: larger dtypes first, so that all are aligned, then by name.
    Complete or absent.

    With `get`, `tensors` need only have dtypes and shapes (on the meta device): get(name) makes
    each when its turn comes, so that they never exist all at once. None as `path`: get them, write
    nothing.
    """
    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    if path is None:
        for name in names:
            get(name)
        return
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": dtypes[tensors[name].dtype], "shape": list(tensors[name].shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(partial: Path) -> None:
        with open(partial, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                tensor = (get(name) if get else tensors[name]).detach().cpu().contiguous()
                file.write(tensor.flatten().view(torch.uint8).numpy())

    replace_file(path, write)


# --------------------------------------------------------------------------------------------------
# Model folders, Hugging Face's and Meta's

# What Hugging Face takes where an old config.json says nothing.
ASSUMED = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
# What makes another architecture, unless it is so.
PLAIN = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
         "partial_rotary_factor": 1.0, "quantization_config": None}


def read_config(folder: Path) -> dict:
    """A model folder's config in Hugging Face's fields; theta and the scaling of the rotary angles
    are `rope_theta` and `rope_scaling` (or None), however they were spelled.

    Raises FileNotFoundError, and ValueError for what is not a plain Llama (or Mistral).
    """
    file = folder / "config.json"
    if not file.is_file() and (folder / "params.json").is_file():
        return meta_config(folder)
    values = ASSUMED | read_json(file)
    if (kind := values.get("model_type")) not in ("llama", "mistral"):
        raise ValueError(f'{file}: expected a Llama (model_type "llama"), got {kind!r}')
    for name, plain in PLAIN.items():
        if values.get(name, plain) not in (plain, None):
            raise ValueError(f"{file}: {name} {values[name]!r} is not supported, only {plain!r}")
    rope = {}
    for name in ("rope_parameters", "rope_scaling"):
        value = values.pop(name, None) or {}
        if not isinstance(value, dict) or any(isinstance(v, dict) for v in value.values()):
            raise ValueError(f"{file}: {name} {value!r} is not supported")
        rope |= value
    if "rope_theta" in rope:
        values["rope_theta"] = rope.pop("rope_theta")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{file}: partial_rotary_factor {rope['partial_rotary_factor']!r} is not "
                         "supported, only 1.0")
    plain = rope.get("rope_type", rope.get("type", "default")) == "default"
    values["rope_scaling"] = None if plain else rope
    return values


def read_model(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of every weight, one after the other, under Hugging Face's names. The folder
    is one whose config was read and found good."""
    if not (folder / "config.json").is_file():
        yield from meta_tensors(folder)
        return
    for file in tensor_files(folder, "model.safetensors", "pytorch_model.bin"):
        yield from read_tensors(file)


META_NAMES = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj", "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm"}


def meta_shards(folder: Path) -> list[dict[str, torch.Tensor]]:
    """Meta's consolidated.NN.pth, one for each GPU of theirs."""
    names = sorted(file.name for file in folder.glob("consolidated.*.pth"))
    if not names or names != [f"consolidated.{i:02}.pth" for i in range(len(names))]:
        raise FileNotFoundError(f"{folder}: expected consolidated.00.pth and on, got "
                                f"{', '.join(names) or 'none'}")
    return [dict(read_pickled(folder / name)) for name in names]


def meta_config(folder: Path) -> dict:
    """What params.json says, what the weights show (two sizes), and what neither does: the window
    is that of Meta's models with such values."""
    values, shards = read_json(folder / "params.json"), meta_shards(folder)
    try:
        vocab_size, intermediate_size = (
            sum(shard[name].shape[0] for shard in shards)
            for name in ("output.weight", "layers.0.feed_forward.w1.weight"))
        config = {
            "vocab_size": vocab_size, "intermediate_size": intermediate_size,
            "hidden_size": values["dim"], "num_hidden_layers": values["n_layers"],
            "num_attention_heads": values["n_heads"],
            "num_key_value_heads": values.get("n_kv_heads"),
            "rms_norm_eps": values["norm_eps"], "rope_theta": values.get("rope_theta", 10000.0)}
    except (KeyError, IndexError) as error:
        raise ValueError(f"{folder}: no {error} in params.json or the weights") from None
    theta, scaling = config["rope_theta"], None
    window = 16384 if theta == 1e6 else 8192 if theta == 5e5 else 4096
    if config["rms_norm_eps"] == 1e-6:  # Llama 1
        window = 2048
    if values.get("use_scaled_rope"):  # Llama 3.1 and 3.3; of 3.2 there are only small ones
        window = 131072
        scaling = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "factor": 32.0 if config["hidden_size"] in (2048, 3072) else 8.0,
                   "original_max_position_embeddings": 8192}
    return config | {"max_position_embeddings": window, "rope_scaling": scaling}


def meta_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Shards joined along the dimension that Meta split; the rows of queries and keys, where pairs
    are neighbours, re-ordered so that they are halves."""
    values, (first, *others) = read_json(folder / "params.json"), meta_shards(folder)
    C, D = values["dim"], values["dim"] // values["n_heads"]
    while first:
        name = next(iter(first))
        pieces = [shard.pop(name, None) for shard in (first, *others)]
        if name == "rope.freqs":
            continue
        layer, part = re.fullmatch(r"(layers\.\d+\.)?(.*)\.weight|.*", name, re.S).groups()
        if part not in META_NAMES or any(p is None or p.shape != pieces[0].shape for p in pieces):
            raise ValueError(f"{folder}: {name} is no weight of Meta's Llama, or differs in shape "
                             "between the shards")
        tensor = pieces[0]
        if others and tensor.dim() == 2:
            by_columns = part in ("attention.wo", "feed_forward.w2") or (
                part == "tok_embeddings" and tensor.shape[1] < C)
            tensor = torch.cat(pieces, dim=int(by_columns))
        if part in ("attention.wq", "attention.wk"):
            if tensor.dim() != 2 or D % 2 or tensor.shape[0] % D:
                raise ValueError(f"{folder}: {name} has shape {tuple(tensor.shape)}, which is not "
                                 f"in heads of {D}")
            # (H * D, C): (D/2, 2) -> (2, D/2)
            tensor = tensor.unflatten(0, (-1, D // 2, 2)).transpose(1, 2).flatten(0, 2)
        yield f"{'model.' + layer if layer else ''}{META_NAMES[part]}.weight", tensor


# --------------------------------------------------------------------------------------------------
# Adapters: PEFT's, and those released with the paper

# Fields of adapter_config.json that are honoured here, or say nothing of the mathematics. Of all
# others only what is false, empty or in HARMLESS is accepted.
HONOURED = {
    "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "modules_to_save", "rank_pattern", "alpha_pattern", "use_rslora",
    "lora_dropout", "task_type", "base_model_name_or_path", "revision", "inference_mode",
    "auto_mapping", "peft_version", "megatron_core", "qalora_group_size", "eva_config"}
HARMLESS = {"bias": ["none"], "init_lora_weights": [True, "gaussian", "orthogonal", "eva"]}


def read_adapter(folder: Path, layers: Iterable[str]) -> tuple[
        dict[str, torch.Tensor], dict[str, tuple[int, float]], set[str]]:
    """An adapter's tensors under the model's names; rank and scaling of those of the model's
    `layers` that have LoRA; and the names that only trainable_params.bin has.

    Raises FileNotFoundError, and ValueError for what cannot be honoured.
    """
    file, tensors = folder / "adapter_config.json", {}
    config = read_json(file)
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(f"{file}: peft_type {kind!r} is not supported, only 'LORA'")
    for name, value in config.items():
        if value and name not in HONOURED and value not in HARMLESS.get(name, []):
            raise ValueError(f"{file}: {name} {value!r} is not supported")

    def add(path: Path) -> None:
        for name, tensor in read_tensors(path):
            # PEFT's names of the adapter and of its wrappers, in files that kept them
            name = re.sub(r"\.(default|modules_to_save|base_layer)(?=\.)", "",
                          name.removeprefix("base_model.model."))
            if not name.endswith("rotary_emb.inv_freq"):
                tensors.setdefault(name, tensor)

    for path in tensor_files(folder, "adapter_model.safetensors", "adapter_model.bin"):
        add(path)
    own = set(tensors)
    if (released := folder / "trainable_params.bin").is_file():
        add(released)

    if not isinstance(config.get("modules_to_save") or [], list):
        raise ValueError(f"{file}: modules_to_save must be a list of names or null")
    targets, found = config.get("target_modules"), {name.split(".lora_")[0] for name in tensors}
    if isinstance(targets, list) and not (
            config.get("layers_to_transform") or config.get("exclude_modules")):
        found = {name for name in layers
                 if any(name == target or name.endswith(f".{target}") for target in targets)}
    loras = {name: rank_and_scaling(file, config, name) for name in layers if name in found}
    if not loras:
        raise ValueError(f"{file}: target_modules {targets!r} names no layer of this model")
    for saved in config.get("modules_to_save") or []:
        if type(saved) is not str or not any(name.endswith(f"{saved}.weight") for name in tensors):
            raise ValueError(f"{file}: modules_to_save has {saved!r}, but no file has its weights")
    return tensors, loras, tensors.keys() - own


def rank_and_scaling(file: Path, config: dict, layer: str) -> tuple[int, float]:
    """A layer's rank, and what its update is multiplied by: alpha / rank, or alpha / sqrt(rank)
    ("rsLoRA")."""

    def value(field: str, patterns: str) -> object:
        for pattern, special in (config.get(patterns) or {}).items():
            if re.fullmatch(r"[\w.]+", pattern):  # most are names, and need no regex of their own
                if f".{layer}".endswith(f".{pattern}"):
                    return special
                continue
            if (len(pattern) > 200 or re.search(r"\)[*+?{]", pattern) or pattern.count("(") > 2
                    or len(re.findall(r"[*+?{]", pattern)) > 3):
                raise ValueError(f"{pattern[:200]!r} could take for ever to match")
            if re.fullmatch(rf"(.*\.)?({pattern})", layer):
                return special
        return config.get(field)

    try:
        rank, alpha = value("r", "rank_pattern"), value("lora_alpha", "alpha_pattern")
    except (AttributeError, ValueError, OverflowError, re.error) as error:
        raise ValueError(f"{file}: broken rank_pattern or alpha_pattern: {error}") from None
    if type(rank) is not int or not 1 <= rank < 1 << 31 or not (
            isinstance(alpha, (int, float)) and -1e30 < alpha < 1e30):
        raise ValueError(f"{file}: expected numbers as r and lora_alpha of {layer}, got {rank!r} "
                         f"and {alpha!r}")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
