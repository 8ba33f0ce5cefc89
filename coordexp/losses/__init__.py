"""Loss atoms and objectives: pure torch, rows of logits in, (sum, count) out.

    sums           SumCount, what every atom returns
    columns        CoordColumns: which logit columns are the coordinate tokens
    distribution   CoordDistribution: log-probabilities and expectations over the K bins, computed once
    coord          atoms and monitors on coordinate slots
    box            box decoding, smooth L1 and CIoU
    text           cross-entropy over the whole vocabulary
    inputs         SupervisedRows and LossInputs: all an objective may look at
    settings       frozen settings read strictly from mappings
    stage1         the stage-1 objective
    modules        settings of the stage-2 module lists
    provenance     what a stage-2 forward is for, and the names its numbers get
    text_weights   weight of every text token in stage 2
    objective      the stage-2 objective
    head           an objective from hidden states, by the plain or the fused head
    projection, head_module, fused, head_products, chunk_logits     parts of the heads

An atom never divides by a local count: whoever combines atoms divides by the count over the whole
optimizer step, so that the loss does not depend on how a step is cut into micro-batches and ranks.
"""
