"""Images for training: found, checked, sorted into shapes, encoded once, and drawn from reproducibly."""

from .buckets import assign, bucket_sizes
from .check import DataReport, check_data
from .images import BadImage, DataProblem, crop_to, load_image, to_tensor
from .latent_cache import LatentCache, default_cache_folder
from .latent_dataset import CachingStopped, LatentDataset, Sample, open_dataset
from .patterns import expanded
from .sources import ImageEntry, MemoryEntry, find_images, fingerprint, image_entries
from .walking import Cancelled, Watch

__all__ = [
    "BadImage",
    "CachingStopped",
    "Cancelled",
    "DataProblem",
    "DataReport",
    "ImageEntry",
    "LatentCache",
    "LatentDataset",
    "MemoryEntry",
    "Sample",
    "Watch",
    "assign",
    "bucket_sizes",
    "check_data",
    "crop_to",
    "default_cache_folder",
    "expanded",
    "fingerprint",
    "find_images",
    "image_entries",
    "load_image",
    "open_dataset",
    "to_tensor",
]
