"""The learned bias against transformers' own buckets."""

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from serving.layers.attention.position_bias import RelativeBias


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("buckets", "reach"), [(32, 128), (8, 20), (12, 1000)])
def test_every_distance_is_in_the_bucket_that_it_was_trained_in(buckets, reach, bidirectional):
    weight = torch.arange(buckets * 2.0).view(buckets, 2)
    distances = torch.arange(-3 * reach, 3 * reach if bidirectional else 1)
    keys, queries = distances + 3 * reach, torch.tensor([[3 * reach]])
    got = RelativeBias(weight, reach, bidirectional=bidirectional)(keys, queries)
    theirs = T5Attention._relative_position_bucket(distances, bidirectional, buckets, reach)
    assert torch.equal(got[0, :, 0], weight[theirs].t())
