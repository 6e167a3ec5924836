"""Images for training: found, checked, sorted into shapes, encoded once, and drawn from reproducibly."""

from .latent_dataset import LatentDataset, Sample
from .patterns import expanded
from .preparing import Callbacks, open_dataset
from .problems import BadImage, CachingStopped, Cancelled, DataProblem
from .settings import DataSettings
from .sources import find_images
from .walking import Watch

__all__ = [
    "BadImage",
    "CachingStopped",
    "Callbacks",
    "Cancelled",
    "DataProblem",
    "DataSettings",
    "LatentDataset",
    "Sample",
    "Watch",
    "expanded",
    "find_images",
    "open_dataset",
]
