"""Hugging Face transformers under context parallelism: an attention implementation for it.

    huggingface.register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="cp_megatron")
    batch = huggingface.shard_batch(group, input_ids=ids, position_ids=positions, labels=labels)
    model(**batch).loss.backward()

The loss is this rank's share: the sum over ranks is the loss of the model on one rank, and the sum
of the parameters' gradients is its gradient.

transformers passes unknown keyword arguments on to every layer's attention and to the loss, so the
batch carries what the engine needs: the mask and layout, the shifted labels, and how many of them
count. Short convolutions and the recurrences of gated DeltaNet, KDA and Mamba-2 get the batch the
same way (``recurrence_hooks.py``). Every other part of a model must compute each token by itself.
``check`` refuses a model that does not: one with another recurrence, for example, or whose tokens
are numbered locally. It runs by itself once, when a model first gets a sharded batch.

transformers reads the documents of a packed row from ``position_ids``: a document ends where the
next position is not one more. RoPE reads the same positions, each rank its own:

    position_ids   0 1 2 3 | 0 1 | 0 1        two ranks, zigzag: rank 0 holds chunks a and d and
    chunks          a   b     c     d         gets the position_ids 0 1 0 1, rank 1 2 3 0 1

A few old models (OPT, Falcon, ...) do not mask documents by ``position_ids`` when they run on one
rank with ``sdpa``, and recurrent layers of transformers carry their state on into the next
document; here documents are separate in every model.
"""

from cp_megatron.model.huggingface.attention_interface import attention as attention
from cp_megatron.model.huggingface.batch_plan import BatchPlan as BatchPlan
from cp_megatron.model.huggingface.batch_plan import shard_batch as shard_batch
from cp_megatron.model.huggingface.check_model import check as check
from cp_megatron.model.huggingface.registration import register as register
from cp_megatron.model.huggingface.trainers import prepare_accelerator as prepare_accelerator
from cp_megatron.model.huggingface.trainers import prepare_trainer as prepare_trainer
from cp_megatron.model.huggingface.whole_rows import take_whole_rows as take_whole_rows
