%% A Diameter client and server on Erlang/OTP's own stack, with the base accounting application.
-module(otp_peer).
-export([server/1, client/2]).
-export([peer_up/3, peer_down/3, pick_peer/4, prepare_request/3, prepare_retransmit/3,
         handle_answer/4, handle_error/4, handle_request/3]).

-define(ACR, 271).

service(Host) ->
    [{'Origin-Host', Host}, {'Origin-Realm', "example.net"}, {'Vendor-Id', 0}, {'Product-Name', "otp"},
     {'Acct-Application-Id', [3]},
     {application, [{alias, acct}, {dictionary, diameter_gen_acct_rfc6733}, {module, ?MODULE}]}].

server(Port) ->
    ok = diameter:start(),
    ok = diameter:start_service(srv, service("server.example.net")),
    {ok, _} = diameter:add_transport(srv, {listen, [{transport_module, diameter_tcp},
        {transport_config, [{reuseaddr, true}, {ip, {127,0,0,1}}, {port, Port}]}]}),
    receive stop -> ok end.

client(Port, Count) ->
    ok = diameter:start(),
    ok = diameter:start_service(cli, service("client.example.net")),
    true = diameter:subscribe(cli),
    {ok, _} = diameter:add_transport(cli, {connect, [{transport_module, diameter_tcp},
        {transport_config, [{raddr, {127,0,0,1}}, {rport, Port}]}]}),
    receive {diameter_event, cli, Info} when element(1, Info) == up -> ok after 15000 -> fail("no connection") end,
    Good = lists:sum([call(N) || N <- lists:seq(1, Count)]),
    io:format("~p answered~n", [Good]),
    halt(case Good of Count -> 0; _ -> 1 end).

call(N) ->
    Session = diameter:session_id("client.example.net"),
    Request = ['ACR', {'Session-Id', Session}, {'Accounting-Record-Type', 1}, {'Accounting-Record-Number', N},
               {'Acct-Application-Id', [3]}],
    case diameter:call(cli, acct, Request, []) of
        {ok, ['ACA' | Avps]} ->
            Session = unicode:characters_to_list(proplists:get_value('Session-Id', Avps)),
            2001 = proplists:get_value('Result-Code', Avps),
            1;
        Other -> io:format("~p~n", [Other]), 0
    end.

fail(Why) -> io:format("~s~n", [Why]), halt(1).

peer_up(_, _, State) -> State.
peer_down(_, _, State) -> State.
pick_peer([Peer | _], _, _, _) -> {ok, Peer}.

prepare_request({diameter_packet, _, _, _, _, _, _} = Packet, Name, Peer) ->
    prepare_request(element(4, Packet), Name, Peer);
prepare_request(Packet, _, {_, Caps}) when is_tuple(Packet) ->
    {send, full(element(4, Packet), Caps)}.
prepare_retransmit(Packet, Name, Peer) -> prepare_request(Packet, Name, Peer).

full(['ACR' | Avps], Caps) ->
    {Host, _} = element(2, Caps),
    {Realm, _} = element(3, Caps),
    ['ACR', {'Origin-Host', Host}, {'Origin-Realm', Realm}, {'Destination-Realm', "example.net"} | Avps].

handle_answer(Packet, _, _, _) -> {ok, element(4, Packet)}.
handle_error(Reason, _, _, _) -> {error, Reason}.

handle_request(Packet, _, {_, Caps}) ->
    ['ACR' | Avps] = case element(4, Packet) of
        [_ | _] = List -> List;
        Record -> as_list(Record)
    end,
    {Host, _} = element(2, Caps),
    {Realm, _} = element(3, Caps),
    {reply, ['ACA', {'Session-Id', get('Session-Id', Avps)}, {'Result-Code', 2001}, {'Origin-Host', Host}, {'Origin-Realm', Realm},
             {'Accounting-Record-Type', get('Accounting-Record-Type', Avps)}, {'Accounting-Record-Number', get('Accounting-Record-Number', Avps)}]}.

get(Name, Avps) when is_list(Avps) -> proplists:get_value(Name, Avps);
get(Name, Map) -> maps:get(Name, Map).

as_list(Record) ->
    Dictionary = diameter_gen_acct_rfc6733,
    Name = Dictionary:rec2msg(element(1, Record)),
    [Name | Dictionary:'#get-'(Record)].
