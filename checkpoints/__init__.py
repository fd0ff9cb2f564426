"""From a file to a parameter and back. Lowest first:

    files.py      a name to a folder, JSON in, any file out atomically
    fields.py     what a JSON object from outside holds: one typed reader, with ranges
    json_lines.py a JSON object a line, of which a kill or a power cut has damaged some
    identity.py   which file it is, whatever its name and its date say
    owned.py      whose folder it is
    names.py      tables that rename tensors, in both directions
    weights.py    strict safetensors: each tensor of a file to one parameter, or an error
    folder.py     what the folders of all layouts share
    barellava.py  tinyllava.py  tinyllava_bench.py  hf_llava.py with hf_tokenizer.py,
                  llava_onevision.py  smolvlm.py  nanovlm.py
                  one published layout each: config.json and names, read and written
    gguf.py with gguf_file.py, gguf_tokenizer.py, gguf_vision.py
                  the files of llama.cpp, which are only written; gguf_check.py asks them there
    layouts.py    the table of these layouts; reads a folder of any of them
    peft.py       adapters, read, merged and written as PEFT does; gguf_lora.py for llama.cpp
    seal.py       a checkpoint of a run on the disk: how it becomes whole, how damage is found
    resume.py     saves such checkpoints, and picks the one to go on from

To load a model, read layouts.py and then weights.py. To see why no run is lost, read seal.py and
then resume.py.
"""
