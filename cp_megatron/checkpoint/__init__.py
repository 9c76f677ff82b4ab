"""Checkpoints: safetensors shards and a JSON manifest, written and read without pickle.

A checkpoint that is saved on one grid loads on any other.

    save.py               saves a model and its optimizer while training continues
      save_planner.py     decides which rank writes which part of which tensor
      shard_writer.py     copies one rank's part and writes it as a safetensors file
    load.py               loads a checkpoint into a model and its optimizer
      shard_reader.py     reads the parts that one rank needs
    state_dict.py         names the tensors of a model and its optimizer
    manifest.py           describes a checkpoint and checks it; does not import torch
    step_folders.py       the folders step-N of a run; does not import torch
    find_checkpoint.py    chooses the checkpoint to load; does not import torch
    object_collectives.py collectives of Python objects; actions that fail on all ranks together
    hf_folder.py          finds the parameters in a Hugging Face folder; does not import torch
    hf_load.py            loads the weights of a Hugging Face folder into a model
    hf_export.py          writes a checkpoint as a Hugging Face folder
    hf_write.py           writes the weights of such a folder
    inert_pickle.py       reads pickles of torch without executing anything; does not import torch
    torch_file.py         finds the tensors in a file of torch.save; does not import torch
    torch_file_reader.py  reads boxes of the tensors in such a file
    dcp_metadata.py       lists the tensors in a folder of DCP; does not import torch
    foreign_names.py      finds a model by the names of its tensors; does not import torch
    torch_import.py       converts checkpoints of torch and torchtitan to a Hugging Face folder
    gguf.py               reads the header of a GGUF file; does not import torch
    gguf_convert.py       converts a GGUF file to a Hugging Face folder
    gguf_gemma.py         adds what a GGUF file of Gemma leaves out; does not import torch
    convert.py            does the work of launch/convert.py

Importing this package does not import torch.
"""
