"""Reading and writing weights: safetensors, pickles read as plain data, checkpoint layouts, domain model files."""

from ..errors import FileProblem
from .domain import check_latent_format, prior_content_hash, read_domain_file, write_domain_file
from .domain_metadata import LATENT_FORMATS, DomainMetadata
from .file_metadata import TRAINING
from .generator import convert_generator, holds_generator, read_generator, write_generator
from .generator_metadata import GeneratorMetadata
from .generator_weights import LoadedGenerator
from .layouts import check_unet, stated_prediction, strip_unet_prefix, unet_layout
from .lora import add_lora, holds_lora, lora_tensors, read_lora
from .model_file import ModelFile, read_keys, read_metadata, read_state_dict
from .safetensors_file import write_safetensors
from .weights import DTYPES, check_finite, file_tensors

__all__ = [
    "DTYPES",
    "LATENT_FORMATS",
    "TRAINING",
    "DomainMetadata",
    "FileProblem",
    "GeneratorMetadata",
    "LoadedGenerator",
    "ModelFile",
    "add_lora",
    "check_finite",
    "check_latent_format",
    "check_unet",
    "convert_generator",
    "file_tensors",
    "holds_generator",
    "holds_lora",
    "lora_tensors",
    "prior_content_hash",
    "read_domain_file",
    "read_generator",
    "read_keys",
    "read_lora",
    "read_metadata",
    "read_state_dict",
    "stated_prediction",
    "strip_unet_prefix",
    "unet_layout",
    "write_domain_file",
    "write_generator",
    "write_safetensors",
]
