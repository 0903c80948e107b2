"""Pickles that run code where they are unpickled: they make a folder."""

import io
import os
import pickle

import torch


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def plain_pickle(marker):
    return pickle.dumps(Bomb(marker))


def torch_archive(marker):
    file = io.BytesIO()
    torch.save({"state": Bomb(marker)}, file)
    return file.getvalue()


def torch_legacy(marker):
    """As torch saved it until 1.6."""
    file = io.BytesIO()
    torch.save({"state": Bomb(marker)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


BOMBS = [plain_pickle, torch_archive, torch_legacy]
