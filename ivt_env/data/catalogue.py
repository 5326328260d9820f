"""What can be fetched: for each data set its files, where they belong under the data root, and its licence.

Places agree with what the readers look for. A checksum or exact size stands here only where it is
published; where there is none, ``fetch`` records what it received, so that a second fetch can be compared.
"""

from __future__ import annotations

import fnmatch
import json
import re
import urllib.parse
from dataclasses import dataclass
from pathlib import PurePosixPath

from ivt_env.data.checked import closest, relative_path
from ivt_env.data.fetch import get_bytes
from ivt_env.data.sample import DataError
from ivt_env.failures import reading

_ARCHIVED = re.compile(r"https?://web\.archive\.org/web/[^/]+/(?=https?://)")

DOWNLOADS = "downloads"
"""Archives wait here, under the data root, until they are unpacked."""


def mirrored(url: str, mirror: str | None) -> str:
    """``url`` on another server: ``mirror``, which may have a path, takes the place of scheme and host.

    An address in the Internet Archive counts as the address that it archives.
    """
    if mirror is None:
        return url
    try:
        parts = urllib.parse.urlsplit(mirror)
    except ValueError as error:  # half an IPv6 address
        raise DataError(
            f"--mirror {mirror!r} is not an address ({error}): give one such as https://example.org"
        ) from error
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise DataError(f"--mirror {mirror!r} is not an address: give one such as https://example.org/datasets")
    original = urllib.parse.urlsplit(_ARCHIVED.sub("", url))
    return mirror.rstrip("/") + urllib.parse.urlunsplit(("", "", original.path, original.query, ""))


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file on a server, and what becomes of it."""

    url: str
    path: str
    """Where it ends up, relative to the data root, with ``/``."""
    bytes: int | None = None
    """Exact size, where published."""
    about_bytes: int | None = None
    """Rounded size, where only that is published: good for asking, not for checking."""
    sha256: str | None = None
    unpack_into: str | None = None
    """For an archive: folder relative to the data root (``.`` is the root itself)."""
    only: tuple[str, ...] = ()
    """Patterns (``fnmatch``, of the plain file name) of the members that are wanted; none means all."""
    below: str = ""
    """Folder inside the archive whose content is wanted; empty means all."""
    flatten: bool = False
    """Whether members lose their folders: for archives whose inner folder is not documented."""
    unpack_factor: float = 0.0
    """Estimate of the unpacked size divided by the archive's, for the check of the disk before a download."""
    must_exist: tuple[str, ...] = ()
    """What unpacking must leave, relative to the data root."""
    must_hold: tuple[str, int] | None = None
    """A folder that unpacking must fill, and with at least how many files."""
    listed_is_all: bool = True
    """Whether ``must_exist`` and ``must_hold`` prove that it is complete, without a note of the unpacking."""


@dataclass(frozen=True, slots=True)
class HubFolder:
    """Files of a Hugging Face Hub data set whose names are asked of the Hub; it also gives size and checksum."""

    dataset: str
    into: str
    """Folder under the data root; files keep their path below ``folder``."""
    pattern: str = "*.parquet"
    """``fnmatch`` pattern of the plain file name."""
    folder: str = ""
    """Folder inside the Hub data set."""
    recursive: bool = False
    """Whether files in the folders below it are wanted too."""
    revision: str = "main"
    split_pattern: str | None = None
    """Pattern with ``{split}`` where a single split can be fetched alone."""


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where the images come from when they are not inside the annotation files."""

    archive: RemoteFile
    folders: tuple[str, ...]
    """Where they may lie under the data root; the first is where they are put if none is there."""
    single_url: str | None = None
    """Address of one image, with ``{name}``; None where only the archive is served."""
    mean_bytes: int = 0
    """Of one image, to estimate a download."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A data set that can be fetched."""

    name: str
    title: str
    licence: str
    notice: str
    """What a user has to know besides: origin, terms of the images, limits of use."""
    homepage: str
    splits: tuple[str, ...]
    files: tuple[RemoteFile, ...] = ()
    hub: tuple[HubFolder, ...] = ()
    images: ImageSource | None = None


def entry(name: str) -> Entry:
    """The data set of that name; DataError for one that cannot be fetched."""
    if name in CATALOGUE:
        return CATALOGUE[name]
    if name in ("scenes", "photos", "screens"):
        raise DataError(f"{name!r} is part of this package: there is nothing to fetch")
    raise DataError(f"no data set {name!r} can be fetched{closest(name, CATALOGUE)}; there are {', '.join(CATALOGUE)}")


def hub_url(dataset: str, revision: str, path: str) -> str:
    """Address of one file of a Hub data set."""
    return f"https://huggingface.co/datasets/{dataset}/resolve/{revision}/{path}"


def hub_files(folder: HubFolder, split: str | None = None, mirror: str | None = None) -> list[RemoteFile]:
    """The files of a Hub folder (of a split, where that can be told), with the sizes and checksums of the Hub."""
    place = f"{folder.dataset}/tree/{folder.revision}" + (f"/{folder.folder}" if folder.folder else "")
    url: str | None = f"https://huggingface.co/api/datasets/{place}" + ("?recursive=true" if folder.recursive else "")
    listed: list[RemoteFile] = []
    while url is not None:
        url = mirrored(url, mirror)
        body, headers = get_bytes(url, f"the listing of {folder.dataset}")
        remedy = "if you gave a --mirror, it must serve the Hub's /api too"
        with reading(f"the listing of {folder.dataset}: {url}", remedy, DataError, "is not a list of files"):
            for row in json.loads(body):
                name = PurePosixPath(row["path"]).name
                if row["type"] == "file" and fnmatch.fnmatchcase(name, folder.pattern):
                    lfs = row.get("lfs") or {"size": row["size"]}  # a small file has no checksum: it is kept in git
                    source = hub_url(folder.dataset, folder.revision, row["path"])
                    below = PurePosixPath(relative_path(row["path"], "path")).relative_to(folder.folder)
                    into = f"{folder.into}/{below}"
                    listed.append(RemoteFile(source, into, bytes=int(lfs["size"]), sha256=lfs.get("oid")))
        following = re.search(r'<([^>]+)>;\s*rel="next"', headers.get("Link") or "")
        url = following[1] if following else None
    if not listed:
        raise DataError(
            f"{folder.dataset}: its folder {folder.folder or '/'} at revision {folder.revision} holds no "
            f"{folder.pattern}; the data set has changed: see whether a newer version of this package knows it"
        )
    if split is None or folder.split_pattern is None:
        return listed
    pattern = folder.split_pattern.format(split=split)
    return [file for file in listed if fnmatch.fnmatchcase(PurePosixPath(file.path).name, pattern)]


# --- Images of COCO -----------------------------------------------------------------------------

COCO_TRAIN2014 = ImageSource(
    archive=RemoteFile(
        url="http://images.cocodataset.org/zips/train2014.zip",
        path=f"{DOWNLOADS}/train2014.zip",
        about_bytes=13_500_000_000,
        unpack_into="images/mscoco/images",
        unpack_factor=1.02,  # JPEG does not compress
        must_hold=("images/mscoco/images/train2014", 82_783),
    ),
    folders=("images/mscoco/images/train2014", "images/train2014", "train2014"),
    single_url="http://images.cocodataset.org/train2014/{name}",
    mean_bytes=163_000,
)

_COCO_TERMS = "The images are COCO's train2014, photographs from Flickr, each under the terms its owner chose there."


# --- The data sets --------------------------------------------------------------------------------

_WAYBACK = "https://web.archive.org/web/{}/https://bvisionweb1.cs.unc.edu/licheng/referit/data/{}"


def _refer(
    name: str, title: str, folder: str, partition: str, stamp: str, size: int, sha256: str, licence: str
) -> Entry:
    archive = f"{folder}.zip"
    return Entry(
        name=name,
        title=title,
        licence=licence,
        notice=f"From a copy in the Internet Archive, the original host being gone. {_COCO_TERMS}",
        homepage="https://github.com/lichengunc/refer",
        splits=("train", "val", "test") if partition == "umd" else ("train", "val", "testA", "testB"),
        files=(
            RemoteFile(
                url=_WAYBACK.format(stamp, archive),
                path=f"{DOWNLOADS}/{archive}",
                bytes=size,
                sha256=sha256,
                unpack_into=".",
                unpack_factor=8.0,  # JSON
                must_exist=(f"{folder}/instances.json", f"{folder}/refs({partition}).p"),
            ),
        ),
        images=COCO_TRAIN2014,
    )


_MDETR_FILES = tuple(
    f"mdetr/finetune_{name}_{split}.json"
    for name, splits in (
        ("refcoco", ("train", "val", "testA", "testB")),
        ("refcoco+", ("train", "val", "testA", "testB")),
        ("refcocog", ("train", "val", "test")),
    )
    for split in splits
)
_VLM_R1_FILES = tuple(
    f"vlm_r1/rec_jsons_processed/{name}_{ending}"
    for name in ("refcoco", "refcocop", "refcocog")
    for ending in ("train.json", "train.jsonl", "val.json")
)

_OSWORLD_G = "daa6bd8e0e629f0917ad2984df930bf0bd967540"
"""Commit, as public evaluations name it."""
_REPORTED = "(as reported; see its page)"
_SCREEN_TERMS = "For evaluation: there is no train split. The programs and pages on the screens belong to their owners."


def _on_hub(
    name: str, title: str, dataset: str, licence: str, *folders: HubFolder, archive: tuple[str, str] | None = None
) -> Entry:
    """A test set of screens; ``archive``: the file that holds its images, and the folder that they fill."""
    images = []
    if archive is not None:
        file, folder = archive
        images = [
            RemoteFile(
                url=hub_url(dataset, "main", file),
                path=f"{DOWNLOADS}/{file}",
                unpack_into=folder.split("/")[0],
                unpack_factor=1.05,
                must_hold=(folder, 1),
                listed_is_all=False,
            )
        ]
    return Entry(
        name=name,
        title=title,
        licence=f"{licence} {_REPORTED}",
        notice=_SCREEN_TERMS,
        homepage=f"https://huggingface.co/datasets/{dataset}",
        splits=("test",),
        files=tuple(images),
        hub=folders,
    )


_ENTRIES = (
    _refer(
        "refcocog", "RefCOCOg", "refcocog", "umd", "20220413012904", 56_712_951,
        "3d1f7e5b2ff2205940bf59de55f861f5f2cc1403fb980669933a7f9af1aa8211",
        "CC BY 4.0 (as stated by Ref-L4's authors; the REFER tool is Apache-2.0); COCO annotations CC BY 4.0",
    ),
    _refer(
        "refcoco", "RefCOCO", "refcoco", "unc", "20220413011718", 53_993_993,
        "7f924bb7ed8dc4568058e4ff626281918d56e5206f4c868c5a80f088f38c8bf0",
        "Apache-2.0 (as stated by Ref-L4's authors); COCO annotations CC BY 4.0",
    ),
    _refer(
        "refcocoplus", "RefCOCO+", "refcoco+", "unc", "20220413011656", 45_613_210,
        "5f1238112d63199e68da54a28f201471909b21ded7ed79a57d51b4c1443c6b45",
        "Apache-2.0 (as stated by Ref-L4's authors); COCO annotations CC BY 4.0",
    ),
    Entry(
        name="refl4",
        title="Ref-L4",
        licence="CC BY-NC 4.0: not for commercial use",
        notice="For evaluation: there is no train split. Its images are from COCO 2014 and Objects365, each under "
        "its own terms.",
        homepage="https://huggingface.co/datasets/JierunChen/Ref-L4",
        splits=("val", "test", "all"),
        hub=(HubFolder("JierunChen/Ref-L4", "refl4", "ref-l4-*.parquet"),),
        images=ImageSource(
            archive=RemoteFile(
                url=hub_url("JierunChen/Ref-L4", "main", "images.tar.gz"),
                path=f"{DOWNLOADS}/ref-l4-images.tar.gz",
                bytes=3_512_747_994,
                sha256="a07c7b85e94d3dcd1f7847ba85d670590b86d6000ffa3c8dd11e988b2af2a7b7",
                unpack_into="refl4/images",
                flatten=True,
                unpack_factor=1.05,
                must_hold=("refl4/images", 1),
                listed_is_all=False,
            ),
            folders=("refl4/images",),
        ),
    ),
    Entry(
        name="refadv",
        title="Ref-Adv-s",
        licence="data CC BY 4.0 as reported, while its repository speaks of 'its own license': see its page",
        notice="For evaluation only, although its file calls the split 'train'. Images of COCO val2017 and "
        "OpenImages are inside, under their own terms.",
        homepage="https://huggingface.co/datasets/dddraxxx/ref-adv-s",
        splits=("test",),
        hub=(HubFolder("dddraxxx/ref-adv-s", "refadv", revision="e7a53e352b5885b8228fc6afa8645ab78e76d5f1"),),
    ),
    Entry(
        name="mdetr",
        title="RefCOCO, RefCOCO+ and RefCOCOg as prepared for MDETR",
        licence="none stated for the data (the code is Apache-2.0)",
        notice=f"The archive also holds other data sets, which are left in it. {_COCO_TERMS}",
        homepage="https://github.com/ashkamath/mdetr",
        splits=("train", "val", "testA", "testB", "test"),
        files=(
            RemoteFile(
                url="https://zenodo.org/record/4729015/files/mdetr_annotations.tar.gz",
                path=f"{DOWNLOADS}/mdetr_annotations.tar.gz",
                unpack_into="mdetr",
                only=("finetune_refcoco*.json",),
                flatten=True,
                unpack_factor=1.0,
                must_exist=_MDETR_FILES,
            ),
        ),
        images=COCO_TRAIN2014,
    ),
    Entry(
        name="vlm_r1",
        title="RefCOCO, RefCOCO+ and RefCOCOg as prepared for VLM-R1",
        licence="none stated for the data",
        notice=_COCO_TERMS,
        homepage="https://huggingface.co/datasets/omlab/VLM-R1",
        splits=("train", "val"),
        files=(
            RemoteFile(
                url=hub_url("omlab/VLM-R1", "main", "rec_jsons_processed.zip"),
                path=f"{DOWNLOADS}/rec_jsons_processed.zip",
                about_bytes=37_600_000,
                unpack_into="vlm_r1/rec_jsons_processed",
                flatten=True,
                unpack_factor=15.0,  # JSON with much repetition
                must_exist=_VLM_R1_FILES,
            ),
        ),
        images=COCO_TRAIN2014,
    ),
    Entry(
        name="lmms",
        title="RefCOCO, RefCOCO+ and RefCOCOg of lmms-lab, images inside",
        licence="none stated",
        notice="For evaluation only: there is no train split, and some val rows share images with RefCOCO's train. "
        "The images are COCO's, under their own terms.",
        homepage="https://huggingface.co/lmms-lab-encoder",
        splits=("val", "test", "testA", "testB"),
        hub=tuple(
            HubFolder(
                f"lmms-lab-encoder/{name}", f"lmms/{name}/data", folder="data", split_pattern="{split}-*.parquet"
            )
            for name in ("RefCOCO", "RefCOCOplus", "RefCOCOg")
        ),
    ),
    Entry(
        name="jxu124",
        title="RefCOCO, RefCOCO+ and RefCOCOg of jxu124",
        licence="none stated",
        notice=_COCO_TERMS,
        homepage="https://huggingface.co/jxu124",
        splits=("train", "val", "testA", "testB", "test"),
        hub=tuple(
            HubFolder(f"jxu124/{name}", f"jxu124/{name}/data", folder="data")
            for name in ("refcoco", "refcocoplus", "refcocog")
        ),
        images=COCO_TRAIN2014,
    ),
    _on_hub(
        "screenspot", "ScreenSpot", "rootsautomation/ScreenSpot", "Apache-2.0",
        HubFolder("rootsautomation/ScreenSpot", "screenspot", recursive=True),
    ),
    _on_hub(
        "screenspotv2", "ScreenSpot-v2", "OS-Copilot/ScreenSpot-v2", "Apache-2.0",
        HubFolder("OS-Copilot/ScreenSpot-v2", "screenspotv2", "screenspot_*_v2.json"),
        archive=("screenspotv2_image.zip", "screenspotv2/screenspotv2_image"),
    ),
    _on_hub(
        "screenspotpro", "ScreenSpot-Pro", "likaixin/ScreenSpot-Pro", "MIT",
        HubFolder("likaixin/ScreenSpot-Pro", "screenspotpro/annotations", "*.json", "annotations"),
        HubFolder("likaixin/ScreenSpot-Pro", "screenspotpro/images", "*", "images", recursive=True),
    ),
    *(
        _on_hub(
            name, title, "ServiceNow/ui-vision", "MIT",
            HubFolder("ServiceNow/ui-vision", f"uivision/annotations/{part}", "*.json", f"annotations/{part}"),
            HubFolder("ServiceNow/ui-vision", f"uivision/images/{part}", "*", f"images/{part}", recursive=True),
        )
        for name, title, part in (
            ("uivision", "UI-Vision, elements", "element_grounding"),
            ("uivisionlayout", "UI-Vision, layout", "layout_grounding"),
        )
    ),
    _on_hub(
        "mmbenchgui", "MMBench-GUI, level 2", "OpenGVLab/MMBench-GUI", "Apache-2.0",
        HubFolder("OpenGVLab/MMBench-GUI", "mmbenchgui", "L2_annotations.json"),
        archive=("MMBench-GUI-OfflineImages.zip", "mmbenchgui/offline_images"),
    ),
    Entry(
        name="osworldg",
        title="OSWorld-G",
        licence=f"Apache-2.0 {_REPORTED}",
        notice=_SCREEN_TERMS,
        homepage="https://github.com/xlang-ai/OSWorld-G",
        splits=("test",),
        files=(
            RemoteFile(
                url=f"https://github.com/xlang-ai/OSWorld-G/archive/{_OSWORLD_G}.zip",
                path=f"{DOWNLOADS}/osworld-g.zip",
                unpack_into="osworldg",
                below=f"OSWorld-G-{_OSWORLD_G}/benchmark",
                unpack_factor=1.05,
                must_exist=("osworldg/OSWorld-G.json",),
                must_hold=("osworldg/images", 1),
                listed_is_all=False,
            ),
        ),
    ),
)  # fmt: skip

CATALOGUE: dict[str, Entry] = {found.name: found for found in _ENTRIES}
"""Name -> data set."""
