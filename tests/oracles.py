"""What many tests need: logits of a model of ours and of transformers', and adapters moved away from their start."""

import torch

from deltaw.models.seen import Documents


def our_logits(model, ids):
    """Logits of one document, as the model is now."""
    ids = torch.as_tensor(ids)
    return model.logits(model.hidden(ids, torch.arange(len(ids)), Documents.of_lengths(len(ids))))


@torch.no_grad()
def hf_logits(hf, ids):
    """The same by transformers."""
    return hf(torch.as_tensor(ids)[None]).logits[0]


def scramble(adapter, size=0.05, seed=7):
    """Move every trained weight away from its start, so that nothing passes because it is zero."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p += size * torch.randn(p.shape, generator=rng)
    return adapter
