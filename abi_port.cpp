#include <algorithm>
#include <gnaforge/abi.h>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <climits>
#include <functional>
#include <string>
#include <vector>
#include <sys/wait.h>
#include <unistd.h>
using namespace std;
struct C{ gnaforge_problem p; gnaforge_tensor q,k,v,o,l; const gnaforge_tensor* by[GNAFORGE_ROLES]; gnaforge_host h; gnaforge_args a; vector<char> b[5]; vector<char> wsb; };
static void pf(int64_t b,int64_t e,int64_t,void(*f)(int64_t,int64_t,void*),void*c){ for(int64_t i=b;i<e;++i) f(i,i+1,c);}
static void base(C&c){ memset(&c.p,0,sizeof c.p); c.p.struct_size=sizeof c.p; c.p.rank=1; c.p.batch=1; c.p.tokens[0]=16; c.p.window[0]=5; c.p.stride[0]=1; c.p.dilation[0]=1; c.p.heads=2;c.p.kv_heads=2;c.p.head_dim=16;c.p.value_head_dim=16;c.p.scale=.25;
 gnaforge_tensor*ts[5]={&c.q,&c.k,&c.v,&c.o,&c.l}; for(int i=0;i<5;++i){ c.b[i].assign(16*2*16*4,0); memset(ts[i],0,sizeof(gnaforge_tensor)); ts[i]->struct_size=sizeof(gnaforge_tensor); ts[i]->dtype=GNAFORGE_FP32; ts[i]->data=c.b[i].data(); int D=i==4?1:16; ts[i]->batch_stride=16*2*D; ts[i]->token_stride[0]=2*D; ts[i]->head_stride=D;}
 c.h={sizeof(gnaforge_host),1,pf}; memset(&c.a,0,sizeof c.a); c.a.struct_size=sizeof c.a; c.a.problem=&c.p; c.a.q=&c.q;c.a.k=&c.k;c.a.v=&c.v;c.a.out=&c.o;c.a.log_sum_exp=&c.l;c.a.host=&c.h;}
int main(int argc,char**argv){
 const gnaforge_entry*e=nullptr; auto*lib=gnaforge_library_v1(); for(unsigned i=0;i<lib->count;++i) if(strstr(lib->entries[i]->key,"-r1-")) e=lib->entries[i];
 vector<pair<string,function<void(C&)>>> cs={
 {"good",[](C&){}},
 {"args null problem",[](C&c){c.a.problem=nullptr;}},{"q null struct",[](C&c){c.a.q=nullptr;}},{"out null struct",[](C&c){c.a.out=nullptr;}},{"host null",[](C&c){c.a.host=nullptr;}},
 {"lse null",[](C&c){c.a.log_sum_exp=nullptr;}},{"lse data null",[](C&c){c.l.data=nullptr;}},{"q data null",[](C&c){c.q.data=nullptr;}},{"out data null",[](C&c){c.o.data=nullptr;}},
 {"args struct_size 8",[](C&c){c.a.struct_size=8;}},{"problem struct_size 8",[](C&c){c.p.struct_size=8;}},{"tensor struct_size 8",[](C&c){c.q.struct_size=8;}},{"lse struct_size 0",[](C&c){c.l.struct_size=0;}},{"host struct_size 4",[](C&c){c.h.struct_size=4; c.h.threads=0x7fffffff;}},
 {"struct_size UINT_MAX",[](C&c){c.a.struct_size=c.p.struct_size=UINT_MAX;}},
 {"features",[](C&c){c.a.features=1ull<<63;}},{"reserved",[](C&c){c.a.reserved=7;}},{"device 9",[](C&c){c.a.device=9;}},
 {"rank 0",[](C&c){c.p.rank=0;}},{"rank -1",[](C&c){c.p.rank=-1;}},{"rank 99",[](C&c){c.p.rank=99;}},
 {"batch -1",[](C&c){c.p.batch=-1;}},{"heads -1",[](C&c){c.p.heads=-1;}},{"kv 0",[](C&c){c.p.kv_heads=0;}},{"kv INT64_MIN",[](C&c){c.p.kv_heads=INT64_MIN;}},
 {"batch 2^62 (tasks overflow)",[](C&c){c.p.batch=1ll<<62;c.p.heads=c.p.kv_heads=8;}},{"heads 2^62 kv 2^62, batch 4",[](C&c){c.p.batch=4;c.p.heads=c.p.kv_heads=1ll<<62;}},
 {"tokens 2^30-1 x batch 2^40",[](C&c){c.p.tokens[0]=(1<<30)-1;c.p.batch=1ll<<40;}},{"tokens INT64_MAX",[](C&c){c.p.tokens[0]=INT64_MAX;}},{"tokens 2^30",[](C&c){c.p.tokens[0]=1<<30;}},
 {"window 0",[](C&c){c.p.window[0]=0;}},{"window 17",[](C&c){c.p.window[0]=17;}},{"window INT64_MIN",[](C&c){c.p.window[0]=INT64_MIN;}},{"stride 6",[](C&c){c.p.stride[0]=6;}},{"dilation 4",[](C&c){c.p.dilation[0]=4;}},{"dilation INT64_MAX",[](C&c){c.p.dilation[0]=INT64_MAX;}},{"causal 2",[](C&c){c.p.causal[0]=2;}},
 {"head_dim 12",[](C&c){c.p.head_dim=12;}},{"head_dim 2^40",[](C&c){c.p.head_dim=1ll<<40;}},{"vdim 0",[](C&c){c.p.value_head_dim=0;}},
 {"dtype q 0",[](C&c){c.q.dtype=0;}},{"dtype 77",[](C&c){c.k.dtype=77;}},{"lse bf16",[](C&c){c.l.dtype=2;}},
 {"stride INT64_MAX",[](C&c){c.k.token_stride[0]=INT64_MAX;}},{"stride -2^62",[](C&c){c.k.token_stride[0]=-(1ll<<62);}},{"out stride 0",[](C&c){c.o.token_stride[0]=0;}},
 {"q misaligned",[](C&c){c.q.data=(char*)c.q.data+1;c.p.tokens[0]=15;}},
 {"scale nan",[](C&c){c.p.scale=0.0/0.0;}},{"scale 1e308",[](C&c){c.p.scale=1e308;}},{"threads INT_MAX",[](C&c){c.h.threads=INT_MAX;}},{"threads -5",[](C&c){c.h.threads=-5;}},{"parallel_for null, threads 8",[](C&c){c.h.threads=8;c.h.parallel_for=nullptr;}},
 };
 int bad=0;
 for(auto&[n,f]:cs){ fflush(stdout); int pd[2]; pipe(pd); pid_t pid=fork(); if(!pid){ alarm(10); dup2(pd[1],2); C c; base(c); f(c); char why[200]=""; int ok=e->can_run(&c.a,why,200); string s=ok?"accepts":string("refuses: ")+why; 
   int64_t ws=0; if(ok){ ws=e->workspace_bytes(&c.a); s+=" ws="+to_string(ws); double w=e->visited_work(&c.a); s+=" work="+to_string(w); void*m=ws<(1ll<<30)?aligned_alloc(256,(ws+255)/256*256):nullptr; printf("%-28s %s",n.c_str(),s.c_str()); fflush(stdout); int rc=e->run(&c.a,m,nullptr,why,200); printf(" run=%d %s",rc,rc?why:""); free(m);} else { printf("%-28s %s",n.c_str(),s.c_str()); fflush(stdout);
     if(argc>1){ ws=e->workspace_bytes(&c.a); printf(" [workspace_bytes -> %ld]",(long)ws);} int rc=e->run(&c.a,nullptr,nullptr,why,200); printf(" run=%d",rc);} fflush(stdout); _exit(0);} close(pd[1]); char buf[4000]; string err; ssize_t g; while((g=read(pd[0],buf,sizeof buf))>0) err.append(buf,g); close(pd[0]); int st; waitpid(pid,&st,0);
   if(st||!err.empty()){ bad++; size_t a=err.find("ERROR"),b=err.find("runtime error"); size_t x=min(a,b); printf("  <== %s%d %s",WIFSIGNALED(st)?"SIG":"exit",WIFSIGNALED(st)?WTERMSIG(st):WEXITSTATUS(st), x==string::npos?err.substr(0,100).c_str():err.substr(x>60?x-60:0,200).c_str()); }
   printf("\n"); }
 printf("cases %zu bad %d\n",cs.size(),bad); }
