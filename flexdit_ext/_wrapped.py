"""The folders that flexdit_ext.diffusers' classes write, read without diffusers."""

from __future__ import annotations

import re
from pathlib import Path

from ._checkpoint_single import build_single
from ._convert_diffusers import WEIGHTS_NAME, read_json, transformer_folder
from .checkpoint import CONFIG_NAME, build_model, find_weights, load_state_dict_file
from .config import FlexDiTConfig
from .single_model import FlexLatte, FlexPixArt

# Fields of our configurations that diffusers' pipelines know by other names.
RENAMED = {
    "FlexDiT": {"input_size": "sample_size"},
    "FlexPixArt": {"input_size": "sample_size", "size_conditions": "use_additional_conditions"},
    "FlexLatte": {"input_size": "sample_size", "num_frames": "video_length"},
}
WRAPPERS = {  # class of a folder -> the model in it
    "FlexDiTTransformer2DModel": "FlexDiT",
    "FlexPixArtTransformer2DModel": "FlexPixArt",
    "FlexLatteTransformer3DModel": "FlexLatte",
}


def load_wrapped(path):
    """The FlexDiT, FlexPixArt or FlexLatte in a folder of flexdit_ext.diffusers, or in transformer/ of a pipeline's.
    Raises ValueError naming the folder."""
    folder = transformer_folder(Path(path))
    values = read_json(folder / CONFIG_NAME)
    name = WRAPPERS.get(values.get("_class_name"))
    if name is None:
        raise ValueError(f"{folder} is of the class {values.get('_class_name')}, must be one of {', '.join(WRAPPERS)}")
    ours = {theirs: field for field, theirs in RENAMED[name].items()}
    values = {ours.get(key, key): value for key, value in values.items() if not key.startswith("_")}
    tensors = load_state_dict_file(find_weights(folder, WEIGHTS_NAME))
    tensors = {re.sub(r"^flexdit\.", "", key): tensor for key, tensor in tensors.items()}
    if name == "FlexDiT":
        del values["out_channels"]
        return build_model(FlexDiTConfig.from_dict(values), tensors, source=str(folder))
    kind = FlexPixArt if name == "FlexPixArt" else FlexLatte
    return build_single(kind, kind.config_class.from_dict(values), tensors, None, None, str(folder))
