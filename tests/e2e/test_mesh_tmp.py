import random, sys, time, pytest, torch
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from anabranch_client import Client, Sampling
from anabranch.model.sources import resolve_model
from launch.reference import Reference
from tests.support.in_process import InProcessCluster
from tests.support.families import build
PAIRS=[((2,1),(1,1)),((1,2),(1,1)),((1,1),(2,1)),((1,1),(1,2)),((2,2),(1,3)),((1,3),(2,2))]
@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder=tmp_path_factory.mktemp("m")/"tiny"
    build("llama-gqa-tied", max_position_embeddings=4096).save_pretrained(folder)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    t=Tokenizer(models.WordLevel({f"w{i}":i for i in range(101)},unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=t,eos_token="w2",bos_token="w1").save_pretrained(folder)
    ref=Reference(resolve_model(str(folder)))
    rng=random.Random(3)
    prompts=[tuple(rng.randrange(101) for _ in range(n)) for n in (1,2,5,63,17,200,400)]
    return folder,{p:ref.generate(p,20,ignore_eos=True).token_ids for p in prompts}
@pytest.mark.parametrize("pair",PAIRS)
@pytest.mark.timeout(90)
def test_pair(pair,model,tmp_path):
    (tp,cp),(dtp,dcp)=pair
    folder,expected=model
    with InProcessCluster(tmp_path,folder,("prefill","decode"),kv_transport="tcp",max_step_tokens=97,collective_timeout_s=10.0,by_role={"prefill":dict(tp=tp,cp=cp),"decode":dict(tp=dtp,cp=dcp)}) as c, Client(c.endpoint) as cl:
        def ask(p): return cl.complete(list(p),Sampling(max_tokens=20,temperature=0.0,ignore_eos=True)).token_ids
        with ThreadPoolExecutor(16) as pool: got=list(pool.map(ask,expected))
        for p,g in zip(expected,got): assert g==expected[p], len(p)
        for p in expected: assert ask(p)==expected[p], ("again",len(p))
        c.wait_idle()
