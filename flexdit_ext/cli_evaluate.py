"""`flexdit evaluate`: a set of images for evaluation, drawn by any number of processes, and what it scores."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import torch

from . import __version__
from ._adapters import merged_state_dict
from ._files import all_or_nothing, write_file
from ._vae import PIXEL_CHANNELS, load_decoder
from .cli_sample import DTYPES, add_machine, add_sampling, count, default_device, labels, require, sampling_options
from .evaluation import digits
from .evaluation.archive import STATISTICS, Archive
from .evaluation.drawing import SHARD_IMAGES, balanced_labels, draw_set, fingerprint
from .evaluation.features import LIBRARIES, compare, extract, load_extractor
from .evaluation.metrics import Statistics
from .evaluation.ranks import Ranks
from .model import FlexDiT
from .sampler import Sampler

DESCRIPTION = f"""\
Draws --num-images images with a FlexDiT into --out, the .npz that the ADM evaluation suite reads: arr_0, uint8
[N, H, W, 3], and arr_1, the labels, balanced over the classes by default. Image i has noise of its own, so the set
depends neither on the number of processes nor on --batch-size. A run that was killed goes on where it was when started
again, also with another number of processes; the work so far lies in OUT.parts.

With --features the images are compared with --reference: fid, sfid, inception_score, precision, recall, those that the
features allow. FEATURES is "module:function" (called with uint8 images [n, 3, H, W], returns features [n, d], or a dict
of features and maybe spatial and probabilities), a torch.jit file of such a function, or {" or ".join(LIBRARIES)}.
--metric digits needs no reference: it judges 8x8 digits by a classifier of scikit-learn's. Results go to stdout."""
EPILOG = """\
exit codes: 0 done, 2 it could not be done, 130 interrupted
examples: flexdit evaluate --checkpoint xl2 --vae sd-vae-ft-ema --num-images 50000 --cfg-scale 1.5 --out xl2.npz
          torchrun --nproc-per-node 8 -m flexdit_ext evaluate --checkpoint ... as above, on 8 GPUs
          flexdit evaluate --images xl2.npz --features torch-fidelity --reference VIRTUAL_imagenet256_labeled.npz"""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="draw a set of images with any number of processes, and score it",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    group = parser.add_argument_group("images")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="DIR", help="save_pretrained's folder or weights file")
    source.add_argument("--images", metavar="FILE", help="score the images of this .npz instead of drawing any")
    add = group.add_argument
    add("--num-images", type=count, default=50_000, metavar="N", help="how many to draw, default %(default)s")
    add("--out", metavar="FILE.npz", help="where to write them")
    add("--vae", metavar="DIR", help="folder of a diffusers AutoencoderKL, or of a pipeline with vae/")
    add("--labels", type=labels, metavar="A,B,...", help="classes to draw in turn, default all")
    add("--labels-file", metavar="FILE.npy", help="the labels of all images, integers [N]")
    add("--seed", type=int, default=0, help="of the whole set, default %(default)s")
    add(
        "--shard-images",
        type=count,
        default=SHARD_IMAGES,
        metavar="N",
        help="per file of OUT.parts, default %(default)s",
    )
    add_sampling(parser)
    add_machine(parser)
    add = parser.add_argument_group("metrics").add_argument
    add("--features", metavar="FEATURES", help="the network, see above")
    add("--features-weights", metavar="FILE", help=f"Inception's, for {' and '.join(LIBRARIES)}, default downloaded")
    add("--features-batch-size", type=count, default=64, metavar="N", help="images at once, default %(default)s")
    add("--reference", metavar="FILE.npz", help="images arr_0, or statistics mu and sigma (mu_s, sigma_s), or both")
    add("--metric", choices=["digits"], action="append", default=[], help="without network or reference: digits")
    add("--statistics", metavar="FILE.npz", help="write mu and sigma (mu_s, sigma_s) of the images, for --reference")
    add("--report", metavar="FILE.json", help="write the results there, too")


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    ranks = Ranks(arguments.device or default_device())
    judge = Judge(arguments, ranks.device) if ranks.is_main else None  # what it lacks is found before the work
    if arguments.checkpoint:
        drawn = _generate(arguments, ranks)
        if judge is not None and not judge.wanted and not arguments.quiet:
            print(f"{'written' if drawn else 'there already'}: {arguments.out}")
    ranks.close()
    if judge is not None and judge.wanted:
        results = json.dumps(judge.results(arguments.images or arguments.out), indent=2)
        print(results)
        if arguments.report:
            _write(arguments.report, (results + "\n").encode())
    return 0


def _check(arguments: argparse.Namespace) -> None:
    wanted = bool(arguments.features or arguments.metric)
    if arguments.images and not wanted:
        raise ValueError("--images needs --features or --metric: there is nothing else to do with it")
    if bool(arguments.checkpoint) != bool(arguments.out):
        raise ValueError("--checkpoint needs --out, the file to write, and --images has none")
    if arguments.out and Path(arguments.out).suffix != ".npz":
        raise ValueError(f"--out is {arguments.out}, must be a .npz file")
    if arguments.labels and arguments.labels_file:
        raise ValueError("--labels and --labels-file exclude each other")
    for name in ("reference", "statistics", "features_weights"):
        if getattr(arguments, name) and not arguments.features:
            raise ValueError(f"--{name.replace('_', '-')} needs --features")
    if arguments.report and not wanted:
        raise ValueError("--report needs --features or --metric")


def _generate(arguments: argparse.Namespace, ranks: Ranks) -> bool:
    model = FlexDiT.from_pretrained(arguments.checkpoint, device=ranks.device)
    wanted = _labels(arguments, model)
    decode = torch.nn.Identity()
    if arguments.vae:
        require("diffusers", "diffusers", "--vae")
        decode = load_decoder(Path(arguments.vae), model.config.in_channels, ranks.device)
    elif model.config.in_channels not in PIXEL_CHANNELS:
        raise ValueError(
            f"the model has {model.config.in_channels} channels, latents: --vae must name their autoencoder"
        )
    sampler = Sampler(model, DTYPES.get(arguments.dtype))
    identity = {
        "flexdit_ext": __version__,
        "config": model.config.to_dict(),
        "weights": fingerprint(merged_state_dict(model)) if ranks.is_main else None,
        "vae": _hash_folder(Path(arguments.vae)) if arguments.vae and ranks.is_main else None,
        "dtype": str(sampler.dtype),
    }
    del model  # the sampler has its own copy
    return draw_set(
        sampler,
        wanted,
        arguments.out,
        decode=decode,
        options=sampling_options(arguments),
        identity=identity,
        ranks=ranks,
        batch_size=arguments.batch_size,
        shard_images=arguments.shard_images,
        progress=ranks.is_main and not arguments.quiet,
    )


def _labels(arguments: argparse.Namespace, model: FlexDiT) -> list[int]:
    config, total = model.config, arguments.num_images
    last = config.num_classes - (0 if config.class_dropout_prob > 0 else 1)
    name, chosen = "--labels", arguments.labels or list(range(config.num_classes))
    if arguments.labels_file:
        name, given = "--labels-file", np.load(arguments.labels_file, allow_pickle=False)
        if given.shape != (total,) or given.dtype.kind not in "iu":
            raise ValueError(f"--labels-file holds {given.dtype} {given.shape}, must be integers [{total}]")
        chosen = given.tolist()
    if bad := [label for label in chosen if not 0 <= label <= last]:
        raise ValueError(f"{name}: {bad[0]}, must be from 0 to {last}")
    return balanced_labels(total, chosen)


def _hash_folder(folder: Path) -> str:
    """Of configurations and weights."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")):
        digest.update(f"{path.relative_to(folder)}\n".encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


class Judge:
    """The metrics that were asked for."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device):
        self._arguments, self._device = arguments, device
        self.wanted = bool(arguments.features or arguments.metric)
        self._extractor = self._reference = None
        if arguments.features:
            self._extractor = load_extractor(arguments.features, device, arguments.features_weights)
        if arguments.reference:
            self._reference = Archive(arguments.reference)
        if arguments.metric:
            digits.load_split(0)

    def results(self, path: str) -> dict:
        images = Archive(path)
        if not len(images):
            raise ValueError(f"{path} has no images, arr_0")
        results = {"images": str(path), "num_images": len(images)}
        if self._extractor is not None:
            results |= {"features": self._arguments.features, "reference": self._arguments.reference}
            results |= self._compared(images)
        if "digits" in self._arguments.metric:
            pixels = np.concatenate(list(images.batches(1024)))
            results["digits"] = digits.measure(pixels, images.labels, progress=not self._arguments.quiet)
        return results

    def _compared(self, images: Archive) -> dict:
        sampled = self._extract(images)
        if self._arguments.statistics:
            self._write_statistics(sampled)
        reference = self._reference
        real = self._extract(reference) if reference is not None and len(reference) else None
        return compare(sampled, real, {} if reference is None else reference.statistics)

    def _extract(self, images: Archive):
        size = self._arguments.features_batch_size
        return extract(self._extractor, images, self._device, size, not self._arguments.quiet)

    def _write_statistics(self, sampled) -> None:
        arrays, file = {}, io.BytesIO()
        for kind, names in STATISTICS.items():
            if getattr(sampled, kind) is not None:
                arrays |= dict(zip(names, Statistics.of(getattr(sampled, kind)), strict=True))
        np.savez(file, **arrays)
        _write(self._arguments.statistics, file.getvalue())


def _write(path: str, data: bytes) -> None:
    with all_or_nothing(Path(path).parent) as folder:
        write_file(folder / Path(path).name, data)
