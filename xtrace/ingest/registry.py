"""stub"""
from importlib import import_module
from xtrace.errors import InputError
def detect(source):
    head=source.head(); best=None
    for m in ("xentrace","xtrace_log","bare","parked"):
        r=import_module("xtrace.ingest."+m).READER
        s=r.sniff(head)
        if s>0 and (best is None or s>best[0]): best=(s,r)
    if best is None: raise InputError(source.path,"is not a trace that xtrace knows",offset=0,exit_bits=16)
    return best[1]
