import tensorrt_rtx as trt, onnx, numpy as np
from onnx import helper as h, TensorProto as T
import sys
def go(val):
    K,N=64,32
    w=h.make_tensor('w',T.INT4,[K,N],vals=np.ones(K*N,dtype=int).tolist()); s=h.make_tensor('s',T.FLOAT,[2,N],vals=np.ones(2*N).tolist())
    z=h.make_tensor('z',T.INT4,[2,N],vals=[val]*(2*N))
    g=h.make_graph([h.make_node('DequantizeLinear',['w','s','z'],['d'],axis=0,block_size=32),h.make_node('MatMul',['x','d'],['y'])],'g',[h.make_tensor_value_info('x',T.FLOAT,[1,K])],[h.make_tensor_value_info('y',T.FLOAT,[1,N])],[w,s,z])
    m=h.make_model(g,opset_imports=[h.make_opsetid('',21)],ir_version=10)
    L=trt.Logger(trt.Logger.ERROR); b=trt.Builder(L); n=b.create_network(1<<int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)); p=trt.OnnxParser(n,L)
    ok=p.parse(m.SerializeToString()); print(val,ok,[p.get_error(i).desc() for i in range(p.num_errors)])
go(0); go(3)
