"""Reading and writing weights: safetensors, pickles read as plain data, checkpoint layouts, domain model files."""

from .domain import (
    LATENT_FORMATS,
    DomainMetadata,
    check_latent_format,
    prior_content_hash,
    read_domain_file,
    stated_prediction,
    write_domain_file,
)
from .generator import (
    GeneratorMetadata,
    LoadedGenerator,
    convert_generator,
    holds_generator,
    read_generator,
    write_generator,
)
from .layouts import Checkpoint, check_unet, split_checkpoint, strip_unet_prefix, unet_layout
from .tensors import (
    DTYPES,
    TRAINING,
    FileProblem,
    ModelFile,
    check_finite,
    file_tensors,
    read_keys,
    read_metadata,
    read_state_dict,
    write_safetensors,
)

__all__ = [
    "DTYPES",
    "LATENT_FORMATS",
    "TRAINING",
    "Checkpoint",
    "DomainMetadata",
    "FileProblem",
    "GeneratorMetadata",
    "LoadedGenerator",
    "ModelFile",
    "check_finite",
    "check_latent_format",
    "check_unet",
    "convert_generator",
    "file_tensors",
    "holds_generator",
    "prior_content_hash",
    "read_domain_file",
    "read_generator",
    "read_keys",
    "read_metadata",
    "read_state_dict",
    "split_checkpoint",
    "stated_prediction",
    "strip_unet_prefix",
    "unet_layout",
    "write_domain_file",
    "write_generator",
    "write_safetensors",
]
