"""The networks whose features published figures are computed in, from installed libraries; their weights come from a file.

N images, F features. The features are not scaled.
"""

import hashlib
import importlib
import io
from pathlib import Path
from pickle import UnpicklingError
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.console import UserError


class Inception(nn.Module):
    """The network of the Fréchet inception distance (Heusel et al. 2017), by torch-fidelity."""

    dimensions, pixels, trace = 2048, None, None  # it has a size of its own
    library, package = "torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity"
    address = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
    checksum, megabytes = "6726825d", 91  # the start of the file's SHA-256

    def __init__(self, state: dict[str, Tensor]):
        """Raises RuntimeError for the weights of another network."""
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # The library unpickles the file that it is given: it is given one that holds nothing but these tensors.
        again = io.BytesIO()
        torch.save(state, again)
        again.seek(0)
        self.network = FeatureExtractorInceptionV3("inception-v3", ["2048"], again)

    def features(self, images: Tensor) -> Tensor:
        """images uint8 N C H W, grey or in colour, of any size; returns N F."""
        (features,) = self.network(images.expand(-1, 3, -1, -1))
        return features


class DinoV2(nn.Module):
    """DINOv2 ViT-L/14 (Oquab et al. 2023), by timm: the network that Stein et al. 2023 recommend in place of Inception.

    Images are prepared as in their code, dgm-eval, and positions are resized as in DINOv2's own code.
    """

    dimensions, pixels, trace = 1024, None, None
    library, package = "timm", "timm"
    address = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
    checksum, megabytes = "d5383ea8", 1218
    side, patches = 224, 16  # pixels of an image, and patches of 14 pixels, along one side

    def __init__(self, state: dict[str, Tensor]):
        """Raises RuntimeError or LookupError for the weights of another network."""
        super().__init__()
        import timm

        with torch.device("meta"):  # no time is spent on random weights, which are replaced
            self.network = timm.create_model("vit_large_patch14_dinov2", img_size=self.side, num_classes=0)
        given = {name: tensor.float() for name, tensor in state.items() if name != "mask_token"}  # of training alone
        self.network.load_state_dict(given | {"pos_embed": resized(given["pos_embed"], self.patches)}, assign=True)

    def features(self, images: Tensor) -> Tensor:
        """images uint8 N C H W, grey or in colour, of any size; returns N F, the class token."""
        from torchvision.transforms import functional as transforms  # slow to import

        # By Pillow, as in dgm-eval: torch's own bicubic filter rounds differently.
        size, bicubic = [self.side, self.side], transforms.InterpolationMode.BICUBIC
        pictures = [transforms.resize(transforms.to_pil_image(image), size, bicubic) for image in images.cpu()]
        inputs = torch.stack([transforms.to_tensor(picture) for picture in pictures]).expand(-1, 3, -1, -1)
        inputs = transforms.normalize(inputs, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        return self.network(inputs.to(images.device))


def resized(positions: Tensor, side: int) -> Tensor:
    """Embeddings of the class token and of M×M patches, 1 1+M² F, for side×side patches.

    As DINOv2's interpolate_pos_encoding does it: bicubic, by a scale that is 0.1 patches too large.
    """
    grid = positions[:, 1:].unflatten(1, (round((positions.shape[1] - 1) ** 0.5), -1)).movedim(-1, 1)
    scale = (side + 0.1) / grid.shape[-1]
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1], grid.flatten(2).movedim(1, -1)], dim=1)


PUBLISHED: dict[str, type[Inception] | type[DinoV2]] = {"inception": Inception, "dinov2": DinoV2}


def published(name: str, weights: Path | None) -> tuple[Inception | DinoV2, str]:
    """The network of this name with weights from a file, or downloaded, and what tables call it.

    Raises UserError where the weights are not to be had.
    """
    network = PUBLISHED[name]
    source = weights or network.address
    size = f"{network.megabytes:,} MB"
    get_it = f"download {network.address} ({size}) on a machine with a network and name the file with --metrics.weights PATH"
    try:
        importlib.import_module(network.library)  # before a long download
        content = (weights or downloaded(network.address, network.checksum)).read_bytes()
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)  # which runs nothing of the file
        standard = hashlib.sha256(content).hexdigest().startswith(network.checksum)
        return network(state), name if standard else f"{name} (not its standard weights, but {Path(source).name})"
    except ImportError as error:
        raise UserError(f"the {name} features need {network.package}: pip install -e '.[{name}]'") from error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"there is no file {weights}; {get_it}") from error
    except (UnpicklingError, EOFError) as error:
        raise UserError(f"{source} is no file of weights; {get_it}") from error
    except URLError as error:
        raise UserError(f"the {name} weights could not be downloaded ({error.reason}); {get_it}") from error
    except (RuntimeError, TypeError, AttributeError, LookupError) as error:
        raise UserError(f"{source} does not hold the weights of this network; {get_it}") from error


def downloaded(address: str, checksum: str) -> Path:
    """The file at this address, in torch's own cache. Raises URLError without a network, RuntimeError for another checksum."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(address).name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(path), checksum)
    return path
